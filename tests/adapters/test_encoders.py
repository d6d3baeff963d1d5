"""Encoders of text: what does not apply to them is refused, and `first` is right behind norms."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests import encoders, models
from tests.state import untouched

IDS = models.tokens(3, 12, delimiter_at=5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_what_needs_a_causal_model_is_refused(family: str) -> None:
    model = encoders.planted(family)
    zeros = torch.zeros(models.LAYERS, models.HEADS, models.HIDDEN // models.HEADS)
    values = bs.KeyValues(zeros, zeros, zeros, zeros, 1, family)
    with untouched(model):
        for call in (
            lambda: bs.patch_model(model, "transplant", key_values=values),
            lambda: bs.calibrate_key_values(model, IDS),
            lambda: bs.SinkCache(model, 8),
            lambda: bs.perplexity(model, [IDS]),
        ):
            with pytest.raises(UnsupportedModel, match="attends in both directions"):
                call()


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@torch.no_grad()
def test_first_leaves_nothing_massive_behind_norms(family: str) -> None:
    """A norm makes a value anew; zeroed where it is born, there is none to be made anew."""
    model = encoders.planted(family)
    sites = bs.calibrate(model, IDS, progress=False)
    assert sites.layers() == list(range(models.LAYER, models.LAYERS))
    assert {site.channel for site in sites} == {models.CHANNEL}
    with bs.patched(model, "set_zero", sites=sites):
        (patch,) = bs.patches(model)
        assert models.LAYER in patch.layers
        with bs.record(model, "block_output") as rec:
            model(IDS)
    for layer in range(models.LAYER, models.LAYERS):
        hidden = rec["block_output"][layer].abs()
        medians = hidden.flatten(1).median(1).values[:, None, None]
        assert not ((hidden > 100) & (hidden > 1000 * medians)).any()
