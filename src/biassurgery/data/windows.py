"""From a stream of tokens to the windows that perplexity is measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.errors import BadBatch, BadOption

LONGEST = 2048  # tokens a window where nobody says otherwise: GPTQ's


def token_windows(model: nn.Module, stream: Tensor, length: int | None, bos: int | None) -> Tensor:
    """Cut token ids (N,) into non-overlapping windows (W, length) int64, `bos` in front of each if
    there is one.

    An incomplete last window is dropped, unless it is the only one. `length` includes `bos`; None:
    the model's context, but at most 2048.

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
    step = _checked(model, length) - (bos is not None)
    rows = (
        stream[: len(stream) // step * step].view(-1, step) if len(stream) >= step else stream[None]
    )
    return rows if bos is None else F.pad(rows, (1, 0), value=bos)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """(N,) int64 token ids of a text, without special tokens."""
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )


def _checked(model: nn.Module, length: int | None) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(config, "max_position_embeddings", None) or getattr(
        config, "max_seq_len", None
    )
    if length is None:
        return min(LONGEST, context or LONGEST)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise BadOption(
            f"length: {length!r}; a window needs at least 2 tokens, for the first one is not"
            " predicted."
        )
    if context and length > context and _has_learned_positions(model, context):
        raise BadOption(
            f"length: {length} is more than the {context} positions that this model has learned;"
            f" use at most {context}."
        )
    return length


def _has_learned_positions(model: nn.Module, context: int) -> bool:
    """Whether the model looks its positions up in a table, which some make a few rows longer than
    their context.
    """
    tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    return any(
        isinstance(m, nn.Embedding)
        and m is not tokens
        and context <= m.num_embeddings <= context + 2
        for m in model.modules()
    )
