"""Caches and masks that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.streaming.cache import SinkCache
from tests.models import planted, planted_vit, tokens
from tests.streaming.streams import OLD, WINDOW, off, random_llama, stream, words


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("window", "sinks", "message"),
    [
        (4, 4, "window: 4 leaves no room beside 4 sinks"),
        (3, 4, "window: 3"),
        (8, -1, "sinks: -1"),
        (0, 0, "window: 0"),
        (8.0, 4, "window: 8.0"),
        (True, 0, "window: True"),
        (8, 1.5, "sinks: 1.5"),
    ],
)
def test_numbers_that_do_not_fit(window: Any, sinks: Any, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        SinkCache(random_llama(), window, sinks)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "learned positions"),
        ("opt", "learned positions"),
        ("falcon_alibi", "builds its ALiBi for the whole sequence"),
        *([("mpt", "the mask of MptForCausalLM does not have the size")] if OLD else []),
    ],
)
def test_families_whose_keys_cannot_move(family: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        SinkCache(planted(family), WINDOW)


def test_models_that_take_no_cache() -> None:
    with pytest.raises(UnsupportedModel, match="both directions"):
        SinkCache(planted_vit(), WINDOW)
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="change with the length"):
        SinkCache(
            random_llama(**({"rope_scaling": scaling} if OLD else {"rope_parameters": scaling})),
            WINDOW,
        )


def test_a_sliding_window_of_the_model_itself() -> None:
    model = planted("mistral")
    model.config.sliding_window = WINDOW
    with pytest.raises(BadOption, match="window: 13 is more than the sliding_window"):
        SinkCache(model, WINDOW + 1)
    ids = tokens(1, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW))
    model.config.sliding_window = None
    assert off(found, stream(model, ids, SinkCache(model, WINDOW))) < 1e-5


def test_rows_of_which_the_cache_was_not_told() -> None:
    model = random_llama()
    ids = words(3, 4)
    with pytest.raises(BadBatch, match="attention_mask: not given"):
        model(ids, past_key_values=SinkCache(model, WINDOW))
    with pytest.raises(BadBatch, match="2 rows and the model 3"):
        model(ids, past_key_values=SinkCache(model, WINDOW, attention_mask=torch.ones(2, 4)))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 1, 0]]),
        torch.tensor([[0, 1, 0, 1]]),
        torch.zeros(1, 3),
        torch.ones(3),
        torch.ones(1, 0),
        5,
    ],
)
def test_masks_that_are_not_padding_on_the_left(mask: Any) -> None:
    with pytest.raises(BadOption, match="on the left only"):
        SinkCache(random_llama(), WINDOW, attention_mask=mask)


def test_padding_needs_room_and_a_mask_that_follows() -> None:
    mask = torch.tensor([[1] * 10, [0] * 9 + [1]])
    with pytest.raises(BadOption, match="does not hold 9 tokens of padding and 4 sinks"):
        SinkCache(random_llama(), WINDOW, attention_mask=mask)
    if OLD:
        with pytest.raises(UnsupportedModel, match="for rows with padding"):
            SinkCache(planted("falcon"), 2 * WINDOW, attention_mask=mask)
    else:
        SinkCache(planted("falcon"), 2 * WINDOW, attention_mask=mask)


@pytest.mark.parametrize("cached", [0, 11, 12, 20])
def test_chunks_that_would_evict(cached: int) -> None:
    model = random_llama()
    ids = words(1, 60)
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :cached], cache)
    with pytest.raises(
        BadBatch,
        match=rf"tokens at once behind {min(cached, WINDOW)} cached ones.*prefill_chunk_size=1",
    ):
        model(ids[:, cached : cached + 13 - min(cached, 11)], past_key_values=cache)
    assert cache.get_seq_length() == cached  # nothing was lost
    wanted = stream(model, ids[:, :30], SinkCache(model, WINDOW))[:, cached:]
    assert off(stream(model, ids[:, cached:30], cache), wanted) < 1e-9
