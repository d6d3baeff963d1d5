"""Rows of a batch, and `generate` with a SinkCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biassurgery.errors import BadBatch
from biassurgery.streaming.cache import SinkCache
from tests.models import PAD_ID, planted, tokens
from tests.streaming.streams import MOVABLE, WINDOW, off, random_llama, stream, words


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# Rows of a batch


def padded(ids: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of the same length, of which each begins with so much padding, and their mask."""
    rows = [torch.cat((torch.full((p,), 48), row[: len(row) - p])) for p, row in zip(padding, ids)]
    return torch.stack(rows), torch.stack([torch.arange(ids.shape[1]) >= p for p in padding]).long()


@pytest.mark.parametrize("padding", [(0, 3, 7), (5, 5, 5), (8, 1, 0)])
def test_padded_rows_are_those_rows_alone(padding: tuple[int, ...]) -> None:
    model = random_llama()
    prompt = 10
    rest = 40
    ids, mask = padded(words(3, prompt + rest), padding)
    cache = SinkCache(model, WINDOW, attention_mask=mask[:, :prompt])
    found = [model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache).logits]
    found += [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        for at in range(prompt, prompt + rest)
    ]
    for row, p in enumerate(padding):
        alone = stream(model, ids[row : row + 1, p:], SinkCache(model, WINDOW))
        together = torch.cat(found, 1)[row : row + 1, p:]
        assert off(together, alone) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt_neox"])
def test_generate_with_padding(family: str) -> None:
    model = planted(family)
    ids = tokens(3, 10)
    padding = (0, 2, 5)
    rows = torch.stack(
        [torch.cat((torch.full((p,), PAD_ID), row[: 10 - p])) for p, row in zip(padding, ids)]
    )
    mask = (rows != PAD_ID).long()
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD_ID,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = model.generate(
        rows,
        attention_mask=mask,
        past_key_values=SinkCache(model, WINDOW, attention_mask=mask),
        **options,
    )
    for row, p in enumerate(padding):
        alone = model.generate(
            rows[row : row + 1, p:], past_key_values=SinkCache(model, WINDOW), **options
        )
        assert torch.equal(together.sequences[row, p:], alone.sequences[0])
        assert off(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0]) < 1e-3


def test_rows_can_change_places() -> None:
    model = random_llama()
    ids, mask = padded(words(3, 45), (0, 3, 7))
    for taken in (9, 14, 30):  # before eviction, while there is padding, and later
        caches = [SinkCache(model, WINDOW, attention_mask=mask) for _ in range(3)]
        for cache in caches:
            for at in range(taken):
                model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
        order = torch.tensor([2, 0, 0])
        caches[0].reorder_cache(order)
        caches[1].batch_select_indices(order)
        caches[2].batch_repeat_interleave(2)
        plain = SinkCache(model, WINDOW, attention_mask=mask)
        for at in range(taken + 12):
            wanted = model(
                ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=plain
            ).logits
            if at >= taken:
                now = ids[:, at : at + 1]
                then = mask[:, : at + 1]
                for cache in caches[:2]:
                    assert (
                        off(
                            model(
                                now[order], attention_mask=then[order], past_key_values=cache
                            ).logits,
                            wanted[order],
                        )
                        < 1e-6
                    )
                twice = model(
                    now.repeat_interleave(2, 0),
                    attention_mask=then.repeat_interleave(2, 0),
                    past_key_values=caches[2],
                )
                assert off(twice.logits, wanted.repeat_interleave(2, 0)) < 1e-6


# generate


@pytest.mark.parametrize("family", MOVABLE)
def test_greedy_generation_is_the_loop_by_hand(family: str) -> None:
    model = planted(family)
    ids = tokens(1, 8, delimiter_at=5)
    found = model.generate(
        ids,
        past_key_values=SinkCache(model, WINDOW),
        max_new_tokens=30,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = stream(model, found.sequences[:, :-1], SinkCache(model, WINDOW))[0, 7:]
    assert off(torch.cat(list(found.logits)), wanted) < 1e-4
    assert torch.equal(found.sequences[0, 8:], wanted.argmax(-1))


def test_sampling_and_a_prompt_beyond_the_window() -> None:
    model = random_llama()
    ids = words(1, 30)
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": True,
        "eos_token_id": None,
        "use_cache": True,
    }
    torch.manual_seed(1)
    found = model.generate(
        ids, past_key_values=SinkCache(model, WINDOW), prefill_chunk_size=1, **options
    )
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :-1], cache)
    torch.manual_seed(1)
    assert torch.equal(
        found, model.generate(ids, past_key_values=cache, **options)
    )  # goes on behind what is cached
    with pytest.raises(
        BadBatch, match="30 tokens at once behind 0 cached ones, where the window holds 12"
    ):
        model.generate(ids, past_key_values=SinkCache(model, WINDOW), **options)


@pytest.mark.parametrize("window", [WINDOW, 40])
def test_beam_search(window: int) -> None:
    model = random_llama()
    ids = words(2, 8)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {
        "max_new_tokens": 20,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    found = model.generate(
        ids, past_key_values=SinkCache(model, window, attention_mask=mask), **options
    )
    assert found.shape == (2, 28)
    assert torch.equal(found, model.generate(ids, **options)) == (window == 40)
