"""A quantity of `record` and a statistic of `detect` of another package, found by their entry
points in a process that imports nothing of it.
"""

from __future__ import annotations

from tests.adapters.conftest import run_with
from tests.extend.test_extensions import code_lines
from tests.third_party.alterations.measures import Entropy, Kurtosis

USE = """
import sys
import torch
import biassurgery as bs
from tests import models
from tests.state import untouched

model, ids = models.planted("llama"), models.tokens()
assert "alterations" not in sys.modules
with untouched(model, ids):
    found = bs.detect(model, [ids], statistics=["kurtosis"])
    with bs.record(model, ["attention_entropy", "probs"], layers=2) as rec, torch.no_grad():
        model(ids)
assert list(found.statistics["kurtosis"]) == list(range(models.LAYERS))
assert found.statistics["kurtosis"][models.LAYER] > 100
wanted = torch.special.entr(rec["probs"][2]).sum(-1)
assert torch.allclose(rec["attention_entropy"][2], wanted, atol=1e-5)
assert wanted.max() > 1
"""


def test_they_are_small():
    assert code_lines(Entropy) <= 10
    assert code_lines(Kurtosis) <= 20


def test_they_are_found_where_they_are_installed(installed, tmp_path):
    done = run_with(installed, USE)
    assert done.returncode == 0, done.stderr
    missing = run_with(tmp_path, USE)
    assert "BadOption: statistics: 'kurtosis' is not known" in missing.stderr
