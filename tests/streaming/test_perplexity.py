"""Perplexity of a stream, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.streaming.cache import SinkCache
from biassurgery.streaming.perplexity import streaming_perplexity
from tests.streaming.streams import SINKS, WINDOW, by_hand, random_llama, stream, words


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("skip", [0, 1, 20])
def test_perplexity_of_a_stream(skip: int) -> None:
    model = random_llama()
    ids = words(1, 40)[0]
    logits = by_hand(model, ids[None], WINDOW, SINKS)[0]
    losses = torch.stack(
        [-logits[at].log_softmax(-1)[ids[at + 1]] for at in range(39) if at + 1 >= skip]
    )
    found = streaming_perplexity(model, ids, SinkCache(model, WINDOW), skip=skip)
    assert found == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert streaming_perplexity(model.train(), ids[None], DynamicCache()) == pytest.approx(
        bs.perplexity(model, ids, length=40), rel=1e-5
    )
    assert model.training


def test_perplexity_refuses() -> None:
    model = random_llama()
    ids = words(1, 20)[0]
    full = SinkCache(model, WINDOW)
    stream(model, ids[None], full)
    for data, cache, skip, error, message in (
        (ids, full, 0, BadOption, "new and empty cache"),
        (ids, None, 0, BadOption, "new and empty cache"),
        (ids, DynamicCache(), -1, BadOption, "skip: -1"),
        (ids, DynamicCache(), 20, BadBatch, "no token to predict"),
        (ids[:1], DynamicCache(), 0, BadBatch, "no token to predict"),
        (ids.view(2, 10), DynamicCache(), 0, BadBatch, "one stream"),
        ("text", DynamicCache(), 0, BadBatch, "str"),
        (ids + 100, DynamicCache(), 0, BadBatch, "not among the 50"),
    ):
        with pytest.raises(error, match=message):
            streaming_perplexity(model, data, cache, skip=skip)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="no logits"):
        streaming_perplexity(model.model, ids, DynamicCache())
    model.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteActivation, match="NaN at 19 of 19"):
        streaming_perplexity(model, ids, DynamicCache())
