"""Tensor parallelism: every mode on every family that has a plan, on two ranks as on one.

`tests/devices` has what is measured there, the gradients, the files and what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from tests.contract.cases import CASES, VARIANTS, Case
from tests.devices.ranks import on_two_ranks
from tests.devices.tensor_parallel_checks import SMALL, close, split
from tests.models import LAYER

# gpt2, falcon, mpt and opt have no plan in either version of transformers.
SPLIT = ("llama", "mistral", "mixtral", "phi", "gpt_neox")


def every_mode(folder: Path) -> None:
    for family in SPLIT:
        model = split(folder, family)
        # Rescaled weights are refused where they are split.
        for case in (case for case in CASES if case.family == family and not case.on_weights):
            _compare(case, model, _given(case, folder))


def _compare(case: Case, model: Any, given: dict[str, Any]) -> None:
    batch = case.batch()
    read = batch[:, 1:] if case.mode == "transplant" else batch
    whole = case.model()
    plain = _logits(model, batch)
    changed = []
    for one in (model, whole):
        torch.manual_seed(7)
        bs.patch_model(one, case.mode, **given)
        changed.append(_logits(one, read))
    assert changed[0].isfinite().all(), case
    close(changed[0], changed[1], 2e-5)  # massive values magnify roundings
    if case.mode in ("set_zero", "set_value", "attention_bias"):
        assert (changed[1] - plain).abs().max() > 20 * SMALL, case
    bs.unpatch_model(model)
    assert _logits(model, batch).equal(plain), case


def _given(case: Case, folder: Path) -> dict[str, Any]:
    """The options of the mode, with what was measured in one process."""
    given = dict(VARIANTS[case.variant][1])
    if case.mode == "transplant":
        given["key_values"] = bs.KeyValues.load(folder / f"{case.family}.keys")
    if case.on_roles:
        sites = bs.Sites.load(folder / f"{case.family}.sites")
        starts = [site for site in sites if site.role == "start"]
        given |= {"layers": LAYER, "sites": bs.Sites(starts, origin=sites.origin)}
    if case.on_values:
        given |= {"layers": LAYER, "sites": bs.Sites.load(folder / f"{case.family}.sites")}
    return given


@torch.no_grad()
def _logits(model: Any, batch: Tensor) -> Tensor:
    torch.manual_seed(11)  # noise is the same on any number of ranks
    return model(batch, use_cache=False).logits


@pytest.mark.long
def test_every_mode_on_two_ranks(tmp_path: Path) -> None:
    for family in SPLIT:
        case = Case(family, "set_mean")
        case.model().save_pretrained(tmp_path / family)
        case.sites().save(tmp_path / f"{family}.sites")
        case.key_values().save(tmp_path / f"{family}.keys")
    on_two_ranks([every_mode], tmp_path)
