"""Perplexity of a stream that is longer than the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import as_inputs
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.measure.reading import reading, with_bar
from biassurgery.ops.exponential import exp


def streaming_perplexity(
    model: nn.Module, ids: Tensor, cache: Any, *, skip: int = 0, progress: bool | None = None
) -> float:
    """exp(mean negative log-likelihood per predicted token) of one stream, token by token.

    As in Xiao et al. 2023, section 4.1.

    Args:
        model: a causal language model of transformers, with its head.
        ids: token ids (N,) or (1, N) int64; the first one is not predicted.
        cache: an empty cache such as `SinkCache(model, window, sinks)`; afterwards it holds the end
            of the stream.
        skip: tokens at the start of `ids` that are read but do not count; `window` for those read
            with a full cache only.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        BadBatch: no token to predict, or ids that the model does not have.
        BadOption: a cache that is not empty or that the model does not fill, or `skip` is no count.
        NonFiniteActivation: the loss is NaN. It may be infinite: so is the perplexity then.
        UnsupportedModel: not a language model, or one without its head.
    """
    host = find_host(model)
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads images, and perplexity is of text."
        )
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise BadOption(f"skip: {skip!r}; give a number of tokens, at least 0.")
    if not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()):
        raise BadOption(
            f"cache: {cache!r}; give a new and empty cache, for example SinkCache(model, window)."
        )
    stream = as_inputs(host, _one_stream(ids, skip), input_device(host.model))["input_ids"]
    losses = []
    cached = host.adapter.cache_arguments(host.model, cache)
    with reading(host.model, eager=False):
        for at in with_bar(range(stream.shape[1] - 1), "streaming", progress):
            step = {"input_ids": stream[:, at : at + 1], **cached}
            output = model(**host.adapter.inputs(host.model, step))
            logits = host.adapter.logits(host.model, output)
            if not at and int(cache.get_seq_length()) != 1:
                raise BadOption(
                    f"cache: {type(cache).__name__} still counts {int(cache.get_seq_length())}"
                    " tokens after one; the model does not fill it."
                )
            if at + 1 >= skip:
                target = stream[:, at + 1].to(logits.device)
                losses.append(F.cross_entropy(logits[:, -1].float(), target))
    return _perplexity(host, torch.stack(losses).double())


def _one_stream(ids: Any, skip: int) -> Tensor:
    """The ids as (1, N), if they leave a token to predict."""
    stream = ids[None] if isinstance(ids, Tensor) and ids.dim() == 1 else ids
    if (
        not isinstance(stream, Tensor)
        or stream.dim() != 2
        or len(stream) != 1
        or stream.shape[1] < max(skip, 1) + 1
    ):
        raise BadBatch(
            f"ids: {tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__} with"
            f" skip={skip} leave no token to predict; give one stream (N,) of token ids that is"
            " longer."
        )
    return stream


def _perplexity(host: Host, losses: Tensor) -> float:
    if losses.isnan().any():
        raise NonFiniteActivation(
            f"ids: the loss is NaN at {int(losses.isnan().sum())} of {len(losses)} tokens;"
            f" {what_to_do(host)}."
        )
    return exp(losses.mean().item())
