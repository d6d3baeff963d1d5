"""Patches of activations, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.errors import Incompatible
from tests.models import CHANNEL, LAYER, planted, tokens

LATER = LAYER + 1


@pytest.fixture(scope="module")
def sites() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens()])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(seed=5)).logits


@pytest.mark.parametrize("positions_first", [True, False])
def test_overlapping_patches_load_in_the_order_in_which_they_were_applied(
    sites, tmp_path, positions_first
):
    steps = [
        (
            "set_value",
            dict(layers=[LATER], channels=[CHANNEL], positions=[4], value=2 * sites[0].mean),
        ),
        ("set_zero", dict(sites=sites, layers=[LAYER, LATER])),
    ]
    model = planted("llama")
    other = planted("llama")
    for (mode, options), (other_mode, other_options) in zip(
        steps[:: 1 if positions_first else -1], steps[:: -1 if positions_first else 1]
    ):
        bs.patch_model(model, mode, **options)
        bs.patch_model(other, other_mode, **other_options)
    assert not torch.equal(logits(model), logits(other))  # the order matters
    bs.save_patch(model, tmp_path)
    again = bs.load_patch(planted("llama"), tmp_path)
    assert [patch.mode.name for patch in bs.patches(again)] == [
        mode for mode, _ in steps[:: 1 if positions_first else -1]
    ]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mode", ["set_mean", "attention_bias"])
@pytest.mark.parametrize("order", [[0, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, 4, 4]])
def test_blocks_that_moved_under_a_patch_are_not_saved(sites, tmp_path, mode, order):
    """The file would say of other blocks, or of none, what was done to these."""
    model = planted("llama")
    options = {"kind": "kv"} if mode == "attention_bias" else {"sites": sites, "layers": "all"}
    bs.patch_model(model, mode, **options)
    bs.save_patch(model, tmp_path / "before")
    written = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    blocks = [model.model.layers[layer] for layer in order]
    if len(set(order)) < len(order):
        blocks[-1] = copy.deepcopy(blocks[-1])
    model.model.layers = nn.ModuleList(blocks)
    for folder in ("before", "new"):
        with pytest.raises(Incompatible, match=r"blocks have come, gone or moved.*unpatch_model"):
            bs.save_patch(model, tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()} == written
    assert not (tmp_path / "new").exists()
    bs.unpatch_model(model)
    bs.patch_model(model, "attention_bias", kind="kv")
    bs.save_patch(model, tmp_path / "new")
