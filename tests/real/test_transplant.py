"""The start token's key and value in its place, on real models: exact where it is a constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer

import biassurgery as bs
from tests.real import plain
from tests.real.conftest import Real

EXACT = 1e-4  # of the largest logit
PAD = 3
NEW = 12  # tokens to generate


def key_values(real: Real) -> bs.KeyValues:
    return bs.calibrate_key_values(real.model, real.started(2, 16))


def generate(real: Real, ids: Tensor, **options: Any) -> list[int]:
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
    out = real.model.generate(ids, do_sample=False, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def test_exact_and_undone(real: Real) -> None:
    """Every logit behind the start token, which merely left out is missed."""
    ids = real.started(1, 64)
    wanted = plain.logits(real.model, ids)
    with bs.patched(real.model, "transplant", key_values=key_values(real)):
        assert plain.relative(plain.logits(real.model, ids[:, 1:]), wanted[:, 1:]) < EXACT
    assert plain.relative(plain.logits(real.model, ids[:, 1:]), wanted[:, 1:]) > 0.05
    assert torch.equal(plain.logits(real.model, ids), wanted)


def test_left_padding(real: Real) -> None:
    """Rows of other lengths, without their start tokens, are those rows alone."""
    ids = real.started(2, 24)
    wanted = [
        plain.logits(real.model, ids[:1])[0, 1:],
        plain.logits(real.model, ids[1:, :-PAD])[0, 1:],
    ]
    rows = torch.full((2, 23), real.start)
    rows[0] = ids[0, 1:]
    rows[1, PAD:] = ids[1, 1:-PAD]
    mask = torch.ones_like(rows)
    mask[1, :PAD] = 0
    with bs.patched(real.model, "transplant", key_values=key_values(real)):
        found = plain.logits(real.model, rows, attention_mask=mask)
    assert plain.relative(found[0], wanted[0]) < EXACT
    assert plain.relative(found[1, PAD:], wanted[1]) < EXACT


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_equal(real: Real, cache: str) -> None:
    ids = real.started(1, 20)
    wanted = generate(real, ids)
    assert len(set(wanted)) > 3
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with bs.patched(real.model, "transplant", key_values=key_values(real)):
        assert generate(real, ids[:, 1:], **options) == wanted


def test_a_chat(smollm2: Real) -> None:
    """SmolLM2's chat template begins with the token that its text otherwise lacks."""
    chat = [{"role": "user", "content": "Name the capital of France."}]
    text = smollm2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = smollm2.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0, 0] == smollm2.start
    wanted = generate(smollm2, ids)
    assert "Paris" in smollm2.tokenizer.decode(wanted)
    with bs.patched(smollm2.model, "transplant", key_values=key_values(smollm2)):
        assert generate(smollm2, ids[:, 1:]) == wanted


class Int8Layer(QuantizedLayer):
    """transformers' quantised cache with a scale for each key and value, which needs no package."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


def decoded(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the last tokens, one by one behind all others."""
    plain.logits(model, ids[:, :-6], past_key_values=cache)
    steps = ids[:, -6:].split(1, 1)
    return torch.cat([plain.logits(model, step, past_key_values=cache) for step in steps], 1)


def test_a_quantised_cache(smollm2: Real) -> None:
    """What is cached of the other tokens is rounded alike; only the start token's was, too."""
    ids = smollm2.started(1, 24)
    layers = range(smollm2.model.config.num_hidden_layers)

    def cache() -> Cache:
        return Cache(layers=[Int8Layer(nbits=8, residual_length=4) for _ in layers])

    wanted = decoded(smollm2.model, ids, cache())
    exact = plain.logits(smollm2.model, ids)[:, -6:]
    assert 1e-4 < plain.relative(wanted, exact) < 0.05
    with bs.patched(smollm2.model, "transplant", key_values=key_values(smollm2)):
        found = decoded(smollm2.model, ids[:, 1:], cache())
    assert plain.relative(found, wanted) < 0.02
    assert plain.relative(found, exact) > 1e-4


@pytest.mark.long
def test_a_start_token_that_varies_is_approximated(smollm2: Real) -> None:
    """Without BOS the mean of many start tokens stands in: nearer than nothing, not exact."""
    ids = smollm2.evaluation[:4]
    wanted = plain.perplexity_behind(smollm2.model, ids, 1)
    found = bs.calibrate_key_values(smollm2.model, smollm2.calibration[:8].split(4))
    assert found.spread > 0.01
    mode = bs.modes.Transplant(found)
    with pytest.warns(UserWarning, match="not a constant"):
        bs.patch_model(smollm2.model, mode)
    approximated = plain.perplexity_behind(smollm2.model, ids[:, 1:], 0)
    bs.unpatch_model(smollm2.model)
    dropped = plain.perplexity_behind(smollm2.model, ids[:, 1:], 0)
    assert approximated == pytest.approx(wanted, rel=0.05)
    assert abs(approximated - wanted) > 1e-3
    assert dropped > approximated


@pytest.mark.long
def test_gemma3_across_its_sliding_window(gemma3: Real) -> None:
    """More tokens than its local layers see at a time, 512."""
    ids = gemma3.started(1, 600)
    assert gemma3.model.config.sliding_window == 512
    wanted = plain.logits(gemma3.model, ids)[:, 1:]
    with bs.patched(gemma3.model, "transplant", key_values=key_values(gemma3)):
        found = plain.logits(gemma3.model, ids[:, 1:])
    assert plain.relative(found, wanted) < EXACT


@pytest.mark.long
def test_streaming_without_kept_sinks(smollm2: Real) -> None:
    """A cache that keeps the first tokens is needed, or their keys and values as biases."""
    stream = smollm2.started(1, 160)[0]
    window = 48

    def perplexity(ids: Tensor, sinks: int) -> float:
        cache = bs.SinkCache(smollm2.model, window, sinks)
        return bs.streaming_perplexity(smollm2.model, ids, cache, skip=window)

    none = perplexity(stream, 0)
    kept = perplexity(stream, 4)
    with bs.patched(smollm2.model, "transplant", key_values=key_values(smollm2)):
        transplanted = perplexity(stream[1:], 0)
    assert none > 1.3 * kept
    assert transplanted == pytest.approx(kept, rel=0.1)


def test_a_sink_cache_that_holds_all_is_no_other(smollm2: Real) -> None:
    ids = smollm2.started(1, 24)
    wanted = plain.logits(smollm2.model, ids, use_cache=False)
    cache = bs.SinkCache(smollm2.model, 64, 4)
    parts = [plain.logits(smollm2.model, part, past_key_values=cache) for part in ids.split(12, 1)]
    assert plain.relative(torch.cat(parts, 1), wanted) < EXACT
