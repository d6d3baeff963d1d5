"""A package that makes its model known by an entry point, as pip installs it."""

from __future__ import annotations

from tests.adapters.conftest import run_with


def test_a_package_makes_its_model_known_by_an_entry_point(installed):
    done = run_with(
        installed,
        """
import warnings
import torch
import biassurgery as bs
from oddformer import CHANNEL, Oddformer

model, words = Oddformer().eval(), torch.tensor([[0, 4, 5, 6], [0, 7, 8, 9]])
with torch.no_grad():
    before = model(words)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    sites = bs.calibrate(model, words)
messages = [str(w.message) for w in told]
assert any("broken" in m and "nowhere_to_be_found" in m for m in messages), messages
assert sites.origin.architecture == "oddformer"
found = {(site.layer, site.channel, site.role) for site in sites}
assert found == {(layer, CHANNEL, "start") for layer in range(3)}
with bs.patched(model, "set_zero", sites=sites), torch.no_grad():
    assert (model(words) - before).abs().max() > 1
with torch.no_grad():
    assert torch.equal(model(words), before)
""",
    )
    assert done.returncode == 0, done.stderr
