"""From a stream of tokens to the windows that perplexity is measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadBatch, BadOption

LONGEST = 2048  # tokens a window where nobody says otherwise: GPTQ's


def token_windows(
    host: Host, stream: Tensor, length: int | None, bos: int | None, start: int | None = None
) -> Tensor:
    """Cut token ids (N,) into non-overlapping windows (W, length) int64.

    `bos` stands in front of each if there is one.

    An incomplete last window is dropped, unless it is the only one. `length` includes `bos`; None:
    the model's context, but at most 2048. A `start` that will be put in front is not part of it.

    Raises:
        BadBatch: no token ids.
        BadOption: a window that is too short, or longer than the model's learned positions; a `bos`
            that is no token id.
    """
    if not stream.numel():
        raise BadBatch("data: it holds no tokens; give a text or a stream that is not empty.")
    if stream.is_floating_point() or stream.is_complex() or stream.dtype is torch.bool:
        raise BadBatch(f"data: a stream of {stream.dtype}; give token ids, int64.")
    if bos is not None and (isinstance(bos, bool) or not isinstance(bos, int) or bos < 0):
        raise BadOption(f"bos: {bos!r}; give a token id such as tokenizer.bos_token_id, or None.")
    stream = stream.long()
    whole = _checked(host, length)
    if start is not None:
        _check_room(host, whole)
    step = whole - (bos is not None)
    rows = stream[None]
    if len(stream) >= step:
        rows = stream[: len(stream) // step * step].view(-1, step)
    return rows if bos is None else F.pad(rows, (1, 0), value=bos)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """(N,) int64 token ids of a text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check_room(host: Host, length: int) -> None:
    """Refuse windows that have no place for one token more."""
    context = host.adapter.context(host.model)
    if context and length >= context and host.adapter.learned_positions(host.model):
        raise BadOption(
            f"length: {length} tokens behind a start token are more than the {context} positions"
            f" that this model has learned; pass length={context - 1}, without start= too, so that"
            " the same tokens are scored."
        )


def _checked(host: Host, length: int | None) -> int:
    context = host.adapter.context(host.model)
    if length is None:
        return min(LONGEST, context or LONGEST)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise BadOption(
            f"length: {length!r}; a window needs at least 2 tokens, for the first one is not"
            " predicted."
        )
    if context and length > context and host.adapter.learned_positions(host.model):
        raise BadOption(
            f"length: {length} is more than the {context} positions that this model has learned;"
            f" use at most {context}."
        )
    return length
