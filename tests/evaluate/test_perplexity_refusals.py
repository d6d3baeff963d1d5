"""Perplexities that are infinite, and those that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.evaluate import perplexity
from tests.evaluate.loops import Letters, loop, stream
from tests.models import VOCAB, planted, planted_vit
from tests.state import untouched


def with_bias(value: float) -> Any:
    """A model whose head adds `value` to the logit of token 5."""
    model = planted("llama")
    weight = model.lm_head.weight.data
    model.lm_head = nn.Linear(weight.shape[1], weight.shape[0])
    model.lm_head.weight.data = weight
    model.lm_head.bias.data = torch.zeros(VOCAB).index_fill(0, torch.tensor(5), value)
    return model


def test_an_impossible_token_gives_infinity() -> None:
    assert perplexity(with_bias(-math.inf), torch.tensor([0, 9, 5, 7])) == math.inf
    assert (
        perplexity(with_bias(1e5), torch.tensor([0, 9, 8, 7])) == math.inf
    )  # finite loss, but beyond float64 as a perplexity
    assert math.isfinite(perplexity(with_bias(-math.inf), torch.tensor([0, 9, 8, 7])))


IDS = torch.tensor([0, 9, 5, 7])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("", {"tokenizer": Letters()}, BadBatch, "no tokens"),
        ("abc", {}, BadOption, "tokenizer: None"),
        (torch.tensor([]), {}, BadBatch, "no tokens"),
        (torch.zeros(0, dtype=torch.int64), {"bos": 0}, BadBatch, "no tokens"),
        (torch.tensor([3]), {}, BadBatch, "no token to predict"),
        ([], {}, BadBatch, "there are none"),
        ([torch.tensor([[3], [4]])], {}, BadBatch, "no token to predict"),
        ([torch.zeros(0, 4, dtype=torch.int64)], {}, BadBatch, "is empty"),
        ([torch.tensor([1, 2, 3])], {}, BadBatch, r"give \(B, T\)"),
        (
            [{"input_ids": IDS[None], "attention_mask": torch.zeros(1, 4)}],
            {},
            BadBatch,
            "all padding",
        ),
        (
            [{"input_ids": IDS[None], "attention_mask": torch.tensor([[0, 1, 0, 1]])}],
            {},
            BadBatch,
            "no token to predict",
        ),
        ([{"inputs_embeds": torch.zeros(1, 4, 64)}], {}, BadBatch, "input_ids or labels"),
        (torch.tensor([0.5, 1.5]), {}, BadBatch, "torch.float32"),
        (torch.tensor([1, VOCAB]), {}, BadBatch, f"token {VOCAB} is not among the {VOCAB}"),
        (torch.tensor([1, -1]), {}, BadBatch, "token -1"),
        (IDS, {"bos": VOCAB + 3}, BadBatch, f"token {VOCAB + 3}"),
        (IDS, {"bos": -1}, BadOption, "bos: -1"),
        (IDS, {"bos": True}, BadOption, "bos: True"),
        (IDS, {"length": 1}, BadOption, "length: 1"),
        (IDS, {"length": 0}, BadOption, "length: 0"),
        (IDS, {"length": 2.5}, BadOption, "length: 2.5"),
        (IDS, {"batch_size": 0}, BadOption, "batch_size: 0"),
        ([IDS[None]], {"length": 4}, BadOption, "data are batches"),
        ([IDS[None]], {"bos": 0}, BadOption, "data are batches"),
        (5, {}, BadBatch, "int is not iterable"),
    ],
)
def test_refusals(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = planted("llama")
    with untouched(model), pytest.raises(error, match=message):
        perplexity(model, data, **options)


@pytest.mark.parametrize(
    ("family", "allowed"),
    [("gpt2", False), ("opt", False), ("llama", True), ("falcon_alibi", True)],
)
def test_a_window_beyond_learned_positions_is_refused(family: str, allowed: bool) -> None:
    model = planted(family)
    ids = stream(600)
    if allowed:
        assert perplexity(model, ids, length=600) == pytest.approx(
            loop(model, [ids.tolist()]), rel=1e-5
        )
    else:
        assert perplexity(model, ids[:256], length=256) > 1
        with pytest.raises(BadOption, match="length: 600 is more than the 256 positions"):
            perplexity(model, ids, length=600)


def test_nan_is_refused() -> None:
    model = with_bias(math.nan)
    with untouched(model), pytest.raises(NonFiniteActivation, match="NaN at 3 of 3 tokens"):
        perplexity(model, IDS)


def test_models_that_have_no_perplexity() -> None:
    with pytest.raises(UnsupportedModel, match=r"no logits.*AutoModelForCausalLM"):
        perplexity(planted("llama").model, IDS)
    with pytest.raises(UnsupportedModel, match="top1_accuracy"):
        perplexity(planted_vit(), IDS)
    with pytest.raises(UnsupportedModel, match="no adapter"):
        perplexity(nn.Linear(2, 2), IDS)
