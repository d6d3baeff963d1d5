"""Reading tokens in several forwards that continue a cache, as generation does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.arguments import call, parameters_of
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel


def in_chunks(
    name: str, tokens: Tensor, padding: Sequence[int], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """The arguments of several forwards that read tokens one part after the other.

    Args:
        name: of the argument that holds the tokens.
        tokens: (B, T) ids or (B, T, D) embeddings.
        padding: of each row, how many of the first tokens are padding.
        sizes: of the parts, T in all.
    """
    mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        {name: tokens[:, end - size : end], "attention_mask": mask[:, :end]}
        for size, end in zip(sizes, ends)
    ]


def continued(host: Host, chunks: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """What the model returns for each chunk; for the first one only, where it has no cache."""
    past = None
    read = 0
    for chunk in chunks:
        cached = cached_arguments(host, chunk, past, read) if len(chunks) > 1 else {}
        output = call(host.model, {**chunk, **cached})
        yield output
        past = next((getattr(output, name, None) for name in cached), None)
        if past is None:
            return
        read = chunk["attention_mask"].shape[1]


def cached_arguments(host: Host, chunk: Mapping[str, Any], past: Any, read: int) -> dict[str, Any]:
    """What a forward that continues a cache is given besides; nothing, where there are none.

    Args:
        host: the model.
        chunk: the other arguments, with the mask of all tokens so far.
        past: the cache; None: there is none yet.
        read: how many tokens have been read before.
    """
    if not caches(host):
        return {}
    cached = host.adapter.cache_arguments(host.model, past)
    if "cache_position" in parameters_of(host.model):
        # Before transformers 5 some models go by it.
        mask = chunk["attention_mask"]
        cached["cache_position"] = torch.arange(read, mask.shape[1], device=mask.device)
    return cached


def caches(host: Host) -> bool:
    """Whether the model's forward takes a cache of transformers."""
    try:
        names = host.adapter.cache_arguments(host.model, None)
    except UnsupportedModel:
        return False
    return set(names) <= set(parameters_of(host.model))
