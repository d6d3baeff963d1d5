"""`set_value` at positions, with every cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.modes import SetValue
from tests import models
from tests.models import HIDDEN, LAYERS
from tests.modes.rewritten import outputs
from tests.state import output_of

POSITIONS = (0, 3, 7, 100)
CHANNELS = (2, 30)


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=16)


def dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@pytest.mark.parametrize("cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 3, 3], [9, 1]], ids=str)
def test_set_value_at_positions_with_a_cache(model, family, layer, chunks, cache):
    ids = models.tokens(rows=2, length=10, seed=9)
    before = output_of(model, ids)
    mode = SetValue(55.25, channels=CHANNELS, positions=POSITIONS)
    with outputs(model, family) as seen, bs.patched(model, mode, layers=[layer]):
        whole = output_of(model, ids)
        hidden = seen[layer].pop()
        past = cache(model)
        steps = []
        with torch.no_grad():
            for part in ids.split(chunks, 1):
                steps.append(model(part, past_key_values=past, use_cache=True).logits)
        parts = torch.cat(seen[layer], 1)
    here = torch.zeros(10, HIDDEN, dtype=torch.bool)
    for position in POSITIONS[:3]:
        here[position, list(CHANNELS)] = True
    for result in (hidden, parts):
        assert (result[:, here] == 55.25).all()
        assert not (result[:, ~here] == 55.25).any()
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)
    assert (whole - before).abs().max() > 0.05


def test_set_value_at_positions_refuses_continuous_batching() -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    model = models.planted("llama")
    hidden = torch.zeros(1, 3, HIDDEN)
    rotation = model.model.rotary_emb(hidden, torch.arange(3)[None])
    paged = object.__new__(
        PagedAttentionCache
    )  # it needs memory of a device to be built, and is not read
    bs.patch_model(model, "set_value", value=3.0, channels=5, positions=2, layers=0)
    with pytest.raises(UnsupportedModel, match="continuous"):
        model.model.layers[0](
            hidden, attention_mask=None, position_embeddings=rotation, cache=paged
        )


def test_set_value_at_positions_needs_no_sites_and_takes_single_numbers(model, family):
    ids = models.tokens(rows=2, length=10)
    with (
        outputs(model, family) as seen,
        bs.patched(model, "set_value", value=3, channels=5, positions=2, layers=0),
    ):
        assert bs.patches(model)[0].mode == SetValue(3, channels=(5,), positions=(2,))
        output_of(model, ids)
    assert (seen[0][0][:, 2, 5] == 3).all()
