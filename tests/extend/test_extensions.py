"""A mode and a kind of bias of another package: applied, saved, loaded in a fresh process,
undone.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery.edits.bias import BIASES
from biassurgery.errors import BadOption
from biassurgery.measure.quantities import QUANTITIES
from biassurgery.measure.statistic import STATISTICS
from biassurgery.modes import MODES, AttentionBias
from tests import models
from tests.adapters.conftest import THIRD_PARTY, run_with
from tests.models import CHANNEL, HIDDEN, LAYER
from tests.state import output_of, untouched

IDS = models.tokens()


def code_lines(cls: type) -> int:
    """Lines of a class that say something: no empty ones, no docstring."""
    source = inspect.getsource(cls).replace(f'"""{cls.__doc__}"""' if cls.__doc__ else "", "")
    return sum(bool(line.strip()) for line in source.splitlines())


@pytest.mark.usefixtures("_alterations")
def test_they_are_small():
    assert code_lines(MODES["shrink"]) <= 15
    assert code_lines(BIASES["output_scale"]) <= 6
    assert code_lines(QUANTITIES["attention_entropy"]) <= 10
    assert code_lines(STATISTICS["kurtosis"]) <= 20


@pytest.mark.usefixtures("_alterations")
def test_the_mode_writes_what_it_says():
    model = models.planted("llama")
    sites = bs.calibrate(model, IDS)
    seen: list[torch.Tensor] = []
    hook = models.blocks(model, "llama")[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    output_of(model, IDS)
    with bs.patched(model, "shrink", sites=sites, by=0.25):
        output_of(model, IDS)
    hook.remove()
    before, after = (hidden[:, 0, CHANNEL] for hidden in seen)
    (mean,) = (s.mean for s in sites.at(LAYER) if s.role == "start" and s.channel == CHANNEL)
    assert (before - mean).abs().max() < 0.1 * abs(mean)
    assert torch.equal(after, torch.full_like(after, 0.25 * mean))


@pytest.mark.usefixtures("_alterations")
def test_the_bias_scales_what_the_heads_return():
    """The same for all heads, it is the output projection times as much."""
    model, scaled = models.planted("llama"), models.planted("llama")
    for block in models.blocks(scaled, "llama"):
        block.self_attn.o_proj.weight.data.mul_(1.25)
    plain = output_of(model, IDS)
    with untouched(model, IDS):
        bs.patch_model(model, "attention_bias", kind="output_scale", init="zero_effect")
        assert torch.allclose(output_of(model, IDS), plain, atol=1e-4)
        added = {n: p for n, p in model.named_parameters() if n.endswith("output_scale.scale")}
        assert [tuple(p.shape) for p in added.values()] == [(models.HEADS,)] * models.LAYERS
        for parameter in added.values():
            parameter.data.fill_(0.25)
        found = output_of(model, IDS)
        bs.unpatch_model(model)
    wanted = output_of(scaled, IDS)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.usefixtures("_alterations")
def test_the_rules_of_a_kind_are_its_own():
    key_values = bs.KeyValues(*[torch.zeros(5, 4, HIDDEN // 4)] * 4, 1, "llama")
    with pytest.raises(BadOption, match="output_scale has no key and no value"):
        AttentionBias("output_scale", init=key_values)
    with pytest.raises(BadOption, match=r"'output_skale' is not known; use .*'output_scale'"):
        AttentionBias("output_skale")
    assert AttentionBias("output_scale", init="zero_effect", trainable="bias").freezes


MAKE = """
import sys
import torch
import biassurgery as bs
from tests import models
from tests.state import fingerprint, output_of

model, ids = models.planted("llama"), models.tokens()
plain, untouched = output_of(model, ids), fingerprint(model)

def undone():
    bs.unpatch_model(model)
    return fingerprint(model) == untouched and torch.equal(output_of(model, ids), plain)
"""
SAVE = """
sites = bs.calibrate(model, ids)
bs.patch_model(model, "shrink", sites=sites, by=0.25)
bs.patch_model(model, "attention_bias", kind="output_scale", std=0.5)
out = output_of(model, ids)
assert (out - plain).abs().max() > 1e-2
bs.save_patch(model, folder)
torch.save(out, folder + "/out.pt")
assert undone()
"""
LOAD = """
bs.load_patch(model, folder)
assert [patch.mode.name for patch in bs.patches(model)] == ["shrink", "attention_bias"]
assert bs.patches(model)[0].mode.by == 0.25
assert torch.equal(output_of(model, ids), torch.load(folder + "/out.pt"))
assert undone()
"""
REFUSED = """
try:
    bs.load_patch(model, folder)
except bs.SurgeryError as error:
    refusal = type(error).__name__ + " " + str(error)
assert fingerprint(model) == untouched
assert "alterations" not in sys.modules
"""


def run(site: Path, saved: Path, *code: str) -> None:
    done = run_with(site, "\n".join([f"folder = {str(saved)!r}", MAKE, *code]))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def saved(installed, tmp_path_factory) -> Path:
    """A folder that a process wrote in which the package is installed, and imported by no one."""
    folder = tmp_path_factory.mktemp("saved")
    run(installed, folder, SAVE)
    return folder


def test_saved_and_loaded_in_a_fresh_process(installed, saved):
    text = (saved / "surgery.json").read_text()
    assert '"alterations.modes"' in text
    assert '"alterations.biases"' in text
    run(installed, saved, LOAD)


@pytest.mark.long
def test_a_missing_package_is_named_and_nothing_is_imported(saved, tmp_path):
    """That it could be imported is not enough: a file does not say what is to be run."""
    says = (
        "MissingPackage folder: {folder} holds the mode 'shrink' of the module alterations.modes,"
    )
    check = f"assert refusal.startswith({says!r}.format(folder=folder)), refusal"
    run(tmp_path, saved, REFUSED, check)
    run(THIRD_PARTY, saved, REFUSED, check, "import alterations.modes, alterations.biases", LOAD)


@pytest.mark.long
def test_a_mode_of_a_script_is_to_be_defined_again(tmp_path):
    """No package has it, so none is to be installed."""
    script = """
from biassurgery.extend import WriteMode

class Scripted(WriteMode):
    name = "scripted"
    def write(self, site): return 0.0
"""
    save = """
bs.patch_model(model, "scripted", sites=bs.calibrate(model, ids))
bs.save_patch(model, folder)
bs.unpatch_model(model)
"""
    refused = """
assert refusal.startswith("MissingPackage"), refusal
assert "the mode 'scripted', which was defined in a script or a notebook; run its" in refusal
"""
    run(tmp_path, tmp_path / "saved", script, save)
    load = """
bs.load_patch(model, folder)
assert not torch.equal(output_of(model, ids), plain)
assert undone()
"""
    run(tmp_path, tmp_path / "saved", REFUSED, refused, script, load)


@pytest.mark.long
def test_a_name_that_another_module_took_is_refused(saved):
    taken = """
from biassurgery.extend import WriteMode

class Other(WriteMode):
    name = "shrink"
    def write(self, site): return 0.0
"""
    wanted = """
assert "of the module alterations.modes, but here that name is of __main__.Other" in refusal
try:
    import alterations.modes
except ValueError as error:
    assert "name: 'shrink' of alterations.modes.Shrink is taken by __main__.Other" in str(error)
else:
    raise AssertionError
"""
    run(THIRD_PARTY, saved, taken, REFUSED, wanted)


@pytest.mark.usefixtures("_alterations")
def test_a_class_that_only_inherits_its_name_is_not_saved_as_another(tmp_path):
    class Nameless(MODES["shrink"]):  # type: ignore[misc]
        """Has no name of its own, so that a file would say `shrink`."""

    assert MODES["shrink"] is not Nameless
    model = models.planted("llama")
    bs.patch_model(model, Nameless(), sites=bs.calibrate(model, IDS))
    with pytest.raises(BadOption, match=r"'shrink' does not stand for its class .*Nameless"):
        bs.save_patch(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mode_object_without_a_name_is_refused():
    from biassurgery.extend import WriteMode

    class Anonymous(WriteMode):
        def write(self, site: bs.Site) -> float:
            return 0.0

    model = models.planted("llama")
    sites = bs.calibrate(model, IDS)
    with untouched(model, IDS), pytest.raises(BadOption, match="Anonymous has no name"):
        bs.patch_model(model, Anonymous(), sites=sites)
