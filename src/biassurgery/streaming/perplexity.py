"""Perplexity of a stream that is longer than the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.adapters.arguments import call
from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import input_device
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, find_host
from biassurgery.adapters.sharing import without_ddp
from biassurgery.data.batches import as_inputs
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step
from biassurgery.ops.exponential import exp


def streaming_perplexity(
    model: nn.Module,
    ids: Tensor,
    cache: Any,
    *,
    skip: int = 0,
    progress: bool | None = None,
    group: Group = None,
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
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: whose streams are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch: no token to predict, or ids that the model does not have.
        BadOption: a cache that is not empty or that the model does not fill, or `skip` is no count.
        NonFiniteActivation: the loss is NaN. It may be infinite: so is the perplexity then.
        UnsupportedModel: not a language model, or one without its head.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("streaming_perplexity", model, group) as ranks:
        host = find_host(model)
        _check(host, cache, skip)
        ranks.same(skip=skip)
        inputs = as_inputs(host, _one_stream(ids, skip), input_device(host.model))
        (stream,) = ranks.apart(iter([inputs["input_ids"]]))
        inner = without_ddp(model)
        losses = []
        cached = host.adapter.cache_arguments(host.model, cache)
        with reading(host.model, eager=False):
            steps = in_step(range(stream.shape[1] - 1), host.root)
            for at in with_bar(steps, "streaming", progress, stream.shape[1] - 1):
                step = {"input_ids": stream[:, at : at + 1], **cached}
                output = call(inner, host.adapter.inputs(host.model, step), host.model)
                logits = host.adapter.logits(host.model, output)
                if not at and int(cache.get_seq_length()) != 1:
                    raise BadOption(
                        f"cache: {type(cache).__name__} still counts {int(cache.get_seq_length())}"
                        " tokens after one; the model does not fill it."
                    )
                if at + 1 >= skip:
                    target = stream[:, at + 1].to(logits.device)
                    losses.append(F.cross_entropy(logits[:, -1].float(), target))
        total = ranks.total(_sums(host, torch.stack(losses).double()))
    return exp((total[0] / total[1]).item())


def _check(host: Host, cache: Any, skip: int) -> None:
    """Refuse what is no text model, no empty cache or no count."""
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[host.adapter.modality]}, and"
            " perplexity is of text."
        )
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise BadOption(f"skip: {skip!r}; give a number of tokens, at least 0.")
    if not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()):
        raise BadOption(
            f"cache: {cache!r}; give a new and empty cache, for example SinkCache(model, window)."
        )


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


def _sums(host: Host, losses: Tensor) -> Tensor:
    """(2,) float64 on the CPU: the sum of the losses (N,), and how many they are."""
    if losses.isnan().any():
        raise NonFiniteActivation(
            f"ids: the loss is NaN at {int(losses.isnan().sum())} of {len(losses)} tokens;"
            f" {what_to_do(host)}."
        )
    return torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
