"""Models that are cast, moved and trained after they were patched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import LevelOverflow
from tests import models
from tests.models import CHANNEL, HIDDEN, LAYER
from tests.modes.rewritten import outputs
from tests.state import output_of


@pytest.fixture
def sites(model):
    return bs.calibrate(model, [models.tokens(seed=seed) for seed in (1, 2)])


# -- casting and moving a patched model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_after_patching_equals_a_patch_after_casting(model, family, sites, dtype):
    ids = models.tokens(rows=2, seed=9)
    twin = copy.deepcopy(model).to(dtype)
    bs.patch_model(model, "set_mean", sites=sites).to(dtype)
    bs.patch_model(twin, "set_mean", sites=sites)
    with outputs(model, family) as seen:
        output = output_of(model, ids)
    assert output.dtype == dtype
    assert torch.equal(output, output_of(twin, ids))
    means = {site.role: torch.tensor(site.mean).to(dtype).item() for site in sites.at(LAYER)}
    assert seen[LAYER][0][:, 0, CHANNEL].tolist() == [means["start"]] * 2
    assert seen[LAYER][0][:, 9, CHANNEL].tolist() == [means["elsewhere"]] * 2


def test_levels_stay_exact_through_a_cast_there_and_back(model, family, sites):
    """bfloat16 would round a level of 9000 by up to 16."""
    ids = models.tokens(rows=2, seed=9)
    bs.patch_model(model, "set_mean", sites=sites).to(torch.bfloat16).to(torch.float32)
    with outputs(model, family) as seen:
        output_of(model, ids)
    mean = next(site.mean for site in sites.at(LAYER) if site.role == "elsewhere")
    assert seen[LAYER][0][:, 9, CHANNEL].tolist() == [torch.tensor(mean).item()] * 2


def test_a_level_that_overflows_after_a_cast_raises(model):
    ids = models.tokens(rows=2)
    with bs.patched(model, "set_value", value=1e5, channels=3, positions=0, layers=1):
        assert output_of(model, ids).isfinite().all()
        model.half()
        with pytest.raises(LevelOverflow, match="float16"):
            output_of(model, ids)


@pytest.mark.cuda
def test_a_patched_model_moves_to_another_device(model, sites):
    ids = models.tokens(rows=2, seed=9)
    bs.patch_model(model, "set_zero", sites=sites)
    there = output_of(model.cuda(), ids.cuda()).cpu()
    torch.testing.assert_close(there, output_of(model.cpu(), ids), rtol=1e-3, atol=1e-3)


# -- gradients


def test_gradients_pass_by_what_is_fixed(model, family, sites):
    """The weight that makes the massive activation moves the loss, until that activation is fixed;
    all other weights still do.
    """
    ids = models.tokens(rows=2, length=12, seed=9)
    writer: Any = models.blocks(model, family)[LAYER].get_submodule(models.ANATOMY[family][1][1])

    def gradients() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        grad = writer.weight.grad.T if family == "gpt2" else writer.weight.grad
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        planted = grad[CHANNEL, [models.START_ID, models.DELIMITER_ID]].clone()
        grad[CHANNEL] = 0
        return planted.abs(), grad.norm(dim=1)

    free, _ = gradients()
    with bs.patched(model, "set_mean", sites=sites):
        fixed, others = gradients()
    assert (free > 1e-12).all()
    assert (fixed < 0.1 * free).all()
    assert (others > 0).sum() >= HIDDEN - 3  # all rows but this channel's
