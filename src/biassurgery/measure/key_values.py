"""The start token's implicit bias made explicit: measured, and put in the place of the token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, chosen_start, start_id
from biassurgery.errors import UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.measure.by_blocks import ByBlocks, Onload, by_blocks
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.progress import count_of
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.start_key_values import Measuring, of_one
from biassurgery.measure.start_tokens import starts_of
from biassurgery.measure.together import in_step
from biassurgery.measure.transplanted import verify
from biassurgery.measure.transplanted_by_blocks import ByBlocksTrial

_PASS = "calibrate_key_values"


def calibrate_key_values(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    start: Start = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    onload: Onload = None,
    spill: str | Path | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> KeyValues:
    """Mean key and value of the start token in every layer and head.

    For `patch_model(model, "transplant", key_values=...)`. Keys are what the softmax gets: after
    the rotation, which is the identity at position 0. Read in evaluation mode, without gradients,
    once; memory does not grow with the number of batches. In a causal model a start token sees
    nothing but itself, so that it alone is run, and each different one once a batch. Under
    `torch.distributed` every rank reads its own batches and all get the sum.

    Args:
        model: a text model of a supported architecture.
        batches: as in `calibrate`; the first real token of each sequence counts, of each document
            in packed ones (`position_ids`).
        start: a constant token to put in front of every sequence, see `calibrate`: the transplant
            is exact then.
        tokenizer: the model's, where `start` is a token.
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        onload, spill: for a model larger than memory, see `calibrate`; the sequence on which the
            transplant is tried goes through each block beside the data.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch, NonFiniteActivation: see their messages; the model is as it was.
        RankFailed: another rank has failed, or does not answer.
        UnsupportedModel: also if the start token acts through more than its keys and values, found
            by transplanting one sequence.
        BadOption, FileError: `checkpoint` cannot be used, or is of another pass.
    """
    with taking_part(_PASS, model, group) as ranks:
        host = find_host(model)
        _check_has_start(host)
        check_loaded(host)
        front = start_id(host, start, tokenizer)
        ranks.same(start=front)
        blocks = by_blocks(host, onload, spill, checkpoint)
        checked = ranks.apart(behind_start(host, as_batches(host, batches), front))
        first = next(checked)
        sequence = _first_sequence(host, first)
        tried = [] if sequence is None or sequence[1].shape[1] < 2 else [sequence]
        measuring = Measuring(host)
        every = chain([first], checked)
        options = chosen_start(front)
        if blocks is not None:
            _read_by_blocks(blocks, tried, measuring, every, progress, batches, **options)
        else:
            for name, whole in in_step(tried, host.root):
                verify(host, name, whole, of_one(host, {name: whole}))
            kept = checkpointed(
                every, checkpoint, _PASS, host, measuring.sums, batches=batches, **options
            )
            measuring.read(kept, progress, count_of(batches) if checkpoint is None else None)
        return ranks.total(replace(measuring.result(), start=front))


def _read_by_blocks(
    blocks: ByBlocks,
    tried: Iterable[tuple[str, Tensor]],
    measuring: Measuring,
    every: Iterable[dict[str, Any]],
    progress: bool | None,
    batches: Any,
    **options: Any,
) -> None:
    """Read all batches block by block, and beside them try the transplant on a sequence, if any."""
    trials = [ByBlocksTrial(blocks.host, name, whole) for name, whole in tried]

    def through(layer: int) -> None:
        for trial in trials:
            trial.through(layer)

    beside = through if trials else None
    blocks.read(measuring, every, _PASS, progress, batches, beside, **options)
    for trial in trials:
        trial.check()


def _check_has_start(host: Host) -> None:
    """Refuse models whose start token does not act, or acts through more than attention."""
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[host.adapter.modality]}, which has no"
            " start token; key values are of text models."
        )
    if host.adapter.recurrent(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} keeps a recurrent state, which hands on more of"
            " the start token than its keys and values; transplant cannot replace it on this"
            " architecture."
        )
    crossing = host.adapter.only_with_images(host.model)
    if crossing:
        raise UnsupportedModel(
            f"model: blocks {list(crossing)} of {type(host.model).__name__} attend to images, so"
            " they have no key and no value of a start token; key values are of models whose blocks"
            " all attend to text."
        )
    chunk = host.adapter.attention_chunk(host.model)
    if chunk is not None:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in chunks of {chunk} tokens, which cut the"
            " start token off from most of a sequence; transplant would not."
        )
    check_causal(host)


def check_causal(host: Host) -> None:
    """Raise `UnsupportedModel` for an encoder, whose start token is no constant.

    Models of images and text may attend in both directions in the image alone, and their start
    token be a constant: the trial tells.
    """
    if not host.adapter.causal(host.model) and not host.adapter.nested(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in both directions, so that the keys and"
            " values of its first token depend on the tokens behind it, and no constant can take"
            " their place; transplant is for models that are causal."
        )


def _first_sequence(host: Host, batch: dict[str, Any]) -> tuple[str, Tensor] | None:
    """The first sequence, and the name of the argument that it is; None: all is padding.

    It goes from the first start token to the row's last real one. What is all padding is refused by
    the measurement.
    """
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    start = starts_of(host, batch)[:1]
    if not len(start):
        return None
    row, first = start[0].tolist()
    mask = batch.get("attention_mask")
    end = batch[name].shape[1] if mask is None else int(mask[row].nonzero().max()) + 1
    return name, batch[name][row : row + 1, first:end]
