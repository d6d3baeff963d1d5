"""How far a model differs from itself where nothing that it reads has changed: its rounding.

Linear layers that quantise their activations while they run (int8) round by a scale that they take
from the values at hand: of the token, or of all tokens of the batch. A step of that rounding is
tipped over by the smallest change, and its size goes by what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host

# Of an embedding's value: a model that does not round answers with a change of that order.
NUDGE = 1e-5


def rounding(
    host: Host, name: str, whole: Tensor, run: Callable[[dict[str, Any]], Tensor]
) -> float:
    """The largest change of a sequence's output, of its largest value, that rounding makes.

    The tokens behind the start are run by themselves, and beside the start of the same sequence
    with each number of their embeddings nudged by `NUDGE` of its size.

    Args:
        host: a text model, being read.
        name: of the argument that the sequence is.
        whole: (1, T, ...) the sequence, at least two tokens.
        run: the logits or hidden states (B, T, ...) of a batch.
    """
    behind = whole[:, 1:]
    alone = run({name: behind})
    both = torch.cat([behind, whole[:, :-1]])
    if name == "input_ids":
        with _nudged(host.model):
            beside = run({name: both})
    else:
        beside = run({name: _nudge(both)})
    return ((beside[:1] - alone).abs().max() / alone.abs().max()).item()


@contextmanager
def _nudged(model: nn.Module) -> Iterator[None]:
    """What the model's embedding returns is nudged, where it tells which module that is."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    embedding = find()
    if embedding is None:
        yield
        return
    handle = embedding.register_forward_hook(lambda module, args, output: _nudge(output))
    try:
        yield
    finally:
        handle.remove()


def _nudge(embeddings: Tensor) -> Tensor:
    """Every second number is a little larger, the others a little smaller."""
    signs = torch.ones(embeddings.shape[-1], device=embeddings.device, dtype=embeddings.dtype)
    signs[1::2] = -1
    return embeddings * (1 + NUDGE * signs)
