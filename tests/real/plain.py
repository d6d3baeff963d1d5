"""What the tests compare with, without the library: forwards, losses, and hooks that write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, **arguments).logits


def perplexity(model: Any, ids: Tensor) -> float:
    """exp(mean negative log-likelihood) of every token but the first of each row."""
    total = 0.0
    for row in ids:
        shares = logits(model, row[None], use_cache=False)[0, :-1].double().log_softmax(-1)
        total -= shares.gather(1, row[1:, None]).sum().item()
    return math.exp(total / ids[:, 1:].numel())


@contextmanager
def writing(model: Any, layer: int, values: dict[int, float]) -> Iterator[None]:
    """Within the block the start token has these values, by channel, at a block's output."""

    def write(module: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = hidden.clone()
        for channel, value in values.items():
            hidden[:, 0, channel] = value
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = model.model.layers[layer].register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def perplexity_behind(model: Any, ids: Tensor, skip: int) -> float:
    """As `perplexity`, of the tokens behind the first `skip` and one more that is read."""
    total = 0.0
    for row in ids:
        shares = logits(model, row[None], use_cache=False)[0, skip:-1].double().log_softmax(-1)
        total -= shares.gather(1, row[skip + 1 :, None]).sum().item()
    return math.exp(total / ids[:, skip + 1 :].numel())
