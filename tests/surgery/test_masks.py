"""The masks under which a patched attention computes."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from tests.models import planted, tokens


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_chunk_behind_a_cache_without_a_mask_sees_all_keys(family):
    """As flash attention gets it: no mask, more keys than queries, the last query sees the last
    key.
    """
    model = planted(family)
    ids = tokens(1)
    wanted = model(ids, use_cache=False).logits[:, 10:17]
    with bs.patched(model, "instrument"):
        model.config._attn_implementation_internal = "flash_attention_2"
        cache = model(ids[:, :10], use_cache=True).past_key_values
        found = model(ids[:, 10:17], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
