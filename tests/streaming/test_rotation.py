"""The rotation of keys that a cache moves: every kind that hosts know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import biassurgery as bs
from biassurgery.streaming.cache import SinkCache
from biassurgery.streaming.rotation import Rotation
from tests.models import planted, tokens
from tests.streaming.streams import (
    OLD,
    SINKS,
    WINDOW,
    by_hand,
    kept,
    off,
    random_llama,
    stream,
    words,
)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon"])
def test_attention_implementations(family: str, implementation: str) -> None:
    model = planted(family)
    ids = tokens(1, 3 * WINDOW)
    wanted = stream(model, ids, SinkCache(model, WINDOW))
    other = type(model)._from_config(model.config, attn_implementation=implementation).eval()
    other.load_state_dict(model.state_dict())
    assert off(stream(other, ids, SinkCache(other, WINDOW)), wanted) < 1e-4


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_scaled_rotations(rope: str) -> None:
    scaling: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "yarn":
        scaling["original_max_position_embeddings"] = 64
    model = random_llama(
        num_hidden_layers=1, **({"rope_scaling": scaling} if OLD else {"rope_parameters": scaling})
    )
    ids = words(1, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW))
    assert off(found[:, -1], model(kept(ids, 3 * WINDOW - 1, WINDOW, SINKS)).logits[:, -1]) < 1e-5
    assert (
        off(found[:, -1], by_hand(model, ids, WINDOW, SINKS)[:, -1]) > 1e-3
    )  # the scaling has an effect


def test_rotations_of_neighbouring_channels() -> None:
    torch.manual_seed(0)
    config = transformers.CohereConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.5,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=49,
        pad_token_id=48,
    )
    model: Any = transformers.CohereForCausalLM(config).eval().double()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    assert cache.layers[0].rotation.interleaved
    found = stream(model, ids, cache)
    assert off(found[:, -1], model(kept(ids, 3 * WINDOW - 1, WINDOW, SINKS)).logits[:, -1]) < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_product_of_complex_numbers(interleaved: bool) -> None:
    keys = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    found = Rotation(frequencies, interleaved)(keys, (3, 10**6))
    for row, by in enumerate((3, 10**6)):
        a, b = (
            (keys[row, ..., 0:6:2], keys[row, ..., 1:6:2])
            if interleaved
            else (keys[row, ..., :3], keys[row, ..., 3:6])
        )
        angles = frequencies.double() * by
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        want = (
            torch.view_as_real(turned).flatten(-2)
            if interleaved
            else torch.cat((turned.real, turned.imag), -1)
        )
        torch.testing.assert_close(found[row], torch.cat((want, keys[row, ..., 6:]), -1))


def test_a_key_that_dwarfs_the_others_does_not_hide_their_rotation():
    """bfloat16, a key bias of 300 in a channel that hardly turns."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
    )
    model = tf.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[7] = 300.0
    cache = bs.SinkCache(model.bfloat16(), 8, sinks=2)
    assert cache.layers[0].rotation.frequencies is not None
