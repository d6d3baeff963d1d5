"""`set_value` at positions needs a cache that counts: right where it does, refused where layers
keep a recurrent state.
"""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.census.tiny import tiny_model

COUNTING = ("qwen2", "gemma2", "bloom", "stablelm")
RECURRENT = ("mamba", "rwkv", "minimax", "recurrent_gemma", "jamba")


@pytest.mark.parametrize("model_type", COUNTING)
@torch.no_grad()
def test_cached_decoding_equals_one_forward(model_type):
    model = tiny_model(model_type)
    ids = torch.randint(2, 60, (2, 7))
    for layer in range(2):
        with bs.patched(
            model, "set_value", value=3.0, channels=(1, 5), positions=(0, 4), layers=[layer]
        ):
            whole = model(ids, use_cache=False).logits
            cache = None
            steps = []
            for at in range(ids.shape[1]):
                out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
        assert (whole - model(ids, use_cache=False).logits).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_recurrent_state_is_refused(model_type):
    with pytest.raises(UnsupportedModel, match="positions"):
        bs.patch_model(
            tiny_model(model_type), "set_value", value=3.0, channels=1, positions=0, layers=[1]
        )


@pytest.mark.parametrize(
    "model_type", [name for name in RECURRENT if name not in ("mamba", "rwkv")]
)
def test_nothing_is_evicted_from_a_recurrent_state(model_type):
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        bs.SinkCache(tiny_model(model_type), 8)
