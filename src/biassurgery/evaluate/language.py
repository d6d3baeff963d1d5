"""Perplexity of a causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.adapters.arguments import call
from biassurgery.adapters.base import PADDING, READS
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, find_host
from biassurgery.adapters.sharing import without_ddp
from biassurgery.data.batches import IGNORED, Batch, as_batches
from biassurgery.data.start import Start, behind_start, chosen_start, start_id
from biassurgery.data.windows import token_windows, tokenize
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.sums import Sums
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.progress import count_of
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step
from biassurgery.ops.exponential import exp
from biassurgery.patching import patches


def perplexity(
    model: nn.Module,
    data: str | Batch | Iterable[Batch],
    *,
    length: int | None = None,
    bos: int | None = None,
    start: Start = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> float:
    """exp(mean negative log-likelihood per predicted token) of a causal language model.

    A text or a stream of tokens is cut into non-overlapping windows, each read by itself (the
    protocol of GPTQ, as in Sun et al. 2024, section 3); an incomplete last window is dropped,
    unless it is the only one. In batches every real token that follows a real one counts, with left
    or right padding; `labels` of -100 take tokens out. The log-softmax is in float32, the
    losses are summed in float64.

    Under `torch.distributed` every rank reads its own data, and all get the perplexity of them
    together.

    Args:
        model: a causal language model of a supported architecture, with its head.
        data: a text, which needs `tokenizer`; a stream of token ids (N,) or (1, N) int64; or
            batches: tensors (B, T) int64, or dicts of the model's arguments, in which
            `attention_mask` (B, T) marks padding.
        length: tokens a window, `bos` included; None: the model's context, but at most 2048.
        bos: a token id to put in front of every window, which is not predicted; None: nothing is
            added.
        start: a constant token to put in front of every window or sequence, `<|im_start|>` for
            example, or its id; see `with_start`. The same tokens are scored with and without it, so
            that the two compare: windows are one token longer than `length`, and the first word,
            which nothing predicts without it, is not scored.
        tokenizer: the model's, where data is a text or `start` a token; its own special tokens are
            not added.
        batch_size: windows a forward.
        checkpoint: a file in which the sums are kept, so that a killed evaluation goes on where it
            was, to the same number; see docs/evaluation.md. None: nothing is kept.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch: no data, not one token to predict, or token ids that the model does not have.
        BadOption: an option that cannot be used.
        FileError: `checkpoint` cannot be used, or is of another evaluation.
        NonFiniteActivation: the loss is NaN. It may be infinite: so is the perplexity then.
        UnsupportedModel: not a language model, or one without its head.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("perplexity", model, group) as ranks:
        host = find_host(model)
        _check_reads_text(host)
        front = start_id(host, start, tokenizer)
        _check_one_start(model, front, bos)
        ranks.same(length=length, bos=bos, start=front)
        batches = _batches(host, data, length, bos, front, tokenizer, batch_size)
        checked = ranks.apart(_scored(host, as_batches(host, batches), front))
        sums = Sums({"loss": 0.0, "tokens": 0})
        options = {"batches": batches, **chosen_start(front)}
        kept = checkpointed(checked, checkpoint, "perplexity", host, sums, **options)
        with reading(host.model, eager=False):
            total = count_of(batches) if checkpoint is None else None
            for batch in with_bar(in_step(kept, host.root), "perplexity", progress, total):
                losses = _losses(without_ddp(model), host, batch)
                sums.add("loss", losses.sum().item())
                sums.add("tokens", len(losses))
        both = torch.tensor([sums["loss"], sums["tokens"]], dtype=torch.float64)
        total, count = ranks.total(both).tolist()
    if not count:
        raise BadBatch(
            "data: there is no token to predict; a window or sequence needs at least two real"
            " tokens."
        )
    return exp(total / count)


def _check_reads_text(host: Host) -> None:
    modality = host.adapter.modality
    if modality != "text":
        advice = "; use top1_accuracy(model, batches)" if modality == "image" else ""
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[modality]}, and perplexity is of"
            f" text{advice}."
        )
    if not host.adapter.causal(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in both directions, so that each token"
            " sees the one it would predict, and its perplexity says nothing; use a causal model,"
            " or compare(model, evaluate) with a measure of your own."
        )


def _check_one_start(model: nn.Module, start: int | None, bos: int | None) -> None:
    """Refuse a second start token."""
    if start is None:
        return
    if bos is not None:
        raise BadOption(
            f"start: {start}, but also bos: {bos}, which would be two start tokens; give bos= to"
            " score the first word as well, or start= to score what is scored without it."
        )
    held = [patch.mode.name for patch in patches(model) if patch.mode.replaces_start]
    if held:
        raise BadOption(
            f"start: {start}, but the model has the patch {held[0]!r}, by which the start token is"
            " in its attention already; leave start= out: the same tokens are scored."
        )


def _scored(
    host: Host, batches: Iterable[dict[str, Any]], start: int | None
) -> Iterator[dict[str, Any]]:
    """The batches behind the start token, with labels that score what is scored without it."""
    if start is not None:
        batches = ({"labels": batch.get("input_ids"), **batch} for batch in batches)
    return behind_start(host, batches, start)


def _batches(
    host: Host,
    data: Any,
    length: int | None,
    bos: int | None,
    start: int | None,
    tokenizer: Any,
    batch_size: int,
) -> Any:
    """Batches from whatever `perplexity` was given."""
    if isinstance(data, str):
        if tokenizer is None:
            raise BadOption(
                "tokenizer: None, but data is a text; pass the model's tokenizer, or token ids."
            )
        data = tokenize(tokenizer, data)
    if isinstance(data, Tensor) and (data.dim() == 1 or (data.dim() == 2 and len(data) == 1)):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BadOption(
                f"batch_size: {batch_size!r}; give the number of windows a forward, at least 1."
            )
        return token_windows(host, data.flatten(), length, bos, start).split(batch_size)
    if length is not None or bos is not None:
        raise BadOption(
            f"length, bos: {length!r}, {bos!r}; they are for a text or a stream of token ids (N,),"
            " but data are batches: leave them out, or pass a stream."
        )
    return data


def _losses(model: nn.Module, host: Host, batch: dict[str, Any]) -> Tensor:
    """(N,) float64 on the CPU: the negative log-likelihood of every token that counts."""
    labels = batch.pop("labels", None)
    labels = batch.get("input_ids") if labels is None else labels
    if labels is None:
        raise BadBatch(
            f"data: a batch has {sorted(batch)}, which does not say what to predict; add input_ids"
            " or labels (B, T) int64."
        )
    rows, tokens = labels.shape
    real = host.adapter.token_roles(host.model, batch, (rows, tokens)) != PADDING
    counts = real[:, 1:] & real[:, :-1] & (labels[:, 1:] != IGNORED)
    output = call(model, host.adapter.inputs(host.model, batch), host.model)
    logits = host.adapter.logits(host.model, output)
    if logits.dim() != 3 or tuple(logits.shape[:2]) != (rows, tokens):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} returns {tuple(logits.shape)} for {rows} x"
            f" {tokens} tokens; perplexity needs one row of logits a token."
        )
    targets = labels[:, 1:].long().masked_fill(~counts, IGNORED).to(logits.device)
    # One sequence at a time: a float32 copy of all logits would be the largest tensor of the whole
    # evaluation.
    rows_of_losses = [
        F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
        for row, target in zip(logits[:, :-1], targets)
    ]
    losses = torch.stack(rows_of_losses).cpu()[counts.cpu()].double()
    if losses.isnan().any():
        raise NonFiniteActivation(
            f"data: the loss is NaN at {int(losses.isnan().sum())} of {len(losses)} tokens of a"
            f" batch; {what_to_do(host)}."
        )
    return losses
