"""The loop that all accuracies share: the largest logit of each image against its label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation
from biassurgery.evaluate.labelled import LabelledBatch, labelled
from biassurgery.evaluate.resume import Count, Record, fingerprint
from biassurgery.measure.reading import reading, with_bar

_SECONDS = 5.0  # between two looks at the counts, each of which waits for the device


def accuracy(
    host: Host,
    batches: Iterable[LabelledBatch],
    logits: Callable[[dict[str, Any]], Tensor],
    *,
    name: str,
    progress: bool | None,
    resume: str | Path | None = None,
    head: tuple[Any, ...] = (),
    whose: str = "the model",
) -> float:
    """Share, 0 to 1, of images whose largest logit is that of their label.

    Args:
        host: the model.
        batches: pairs of images and labels.
        logits: from a batch's inputs to (B, C).
        name: of the measure, for the progress bar and the file.
        progress: show a progress bar; None: only on a terminal.
        resume: a JSON file to keep the counts in, see `Record`; None: nothing is kept.
        head: what else the logits depend on, tensors and names, so that `resume` can tell.
        whose: classes the logits are of, for messages.

    Raises:
        BadBatch: no batches, one that is no pair, or labels beyond the classes.
        BadOption: `resume` with a loader that shuffles, or that is shorter than what is counted.
        FileError: `resume` cannot be read or written, or is another file.
        NonFiniteActivation: NaN in the logits.
    """
    if resume is not None and isinstance(getattr(batches, "sampler", None), RandomSampler):
        raise BadOption(
            f"resume: {resume}, but the loader shuffles, so that nobody knows which images are"
            " counted; pass shuffle=False."
        )
    pairs = with_bar(batches, name, progress)
    first = next(pairs, None)
    if first is None:
        raise BadBatch("batches: there are none; give at least one pair of images and labels.")
    record = (
        None
        if resume is None
        else Record(resume, fingerprint(name, host.root, first, head), name, host.root)
    )
    count = Count() if record is None else record.read()
    if isinstance(batches, Sized) and len(batches) < count.batches:
        raise BadOption(
            f"resume: {resume} has counted {count.batches} of these batches, but there are"
            f" {len(batches)}; use another file."
        )
    pending: list[Tensor] = []
    looked = time.monotonic()
    rest = islice(chain([first], pairs), count.batches, None)
    with reading(host.root, eager=False):
        for inputs, labels in () if _complete(batches, count) else labelled(host, rest):
            pending.append(_judged(logits(inputs), labels, whose))
            count = Count(count.batches + 1, count.right, count.images + len(labels))
            if time.monotonic() - looked >= _SECONDS:
                count = _settled(count, pending, record, whose)
                looked = time.monotonic()
    count = _settled(count, pending, record, whose)
    return count.right / count.images


def _complete(batches: Any, count: Count) -> bool:
    """Whether every batch is known to be counted, so that none needs to be read again."""
    return isinstance(batches, Sized) and len(batches) == count.batches


def _judged(logits: Tensor, labels: Tensor, whose: str) -> Tensor:
    """(5,) int64 on the device, which is not waited for: right answers, whether there is NaN,
    -smallest and largest label, classes.
    """
    if logits.dim() != 2 or len(logits) != len(labels):
        raise BadBatch(
            f"batches: {whose} gives {tuple(logits.shape)} logits for {len(labels)} images; one row"
            " an image is needed."
        )
    labels = labels.to(logits.device, non_blocking=logits.is_cuda)
    right = (logits.argmax(-1) == labels).sum()
    classes = torch.tensor(logits.shape[1], device=logits.device)
    return torch.stack(
        [right, logits.isnan().any().long(), -labels.min().long(), labels.max().long(), classes]
    )


def _settled(count: Count, pending: list[Tensor], record: Record | None, whose: str) -> Count:
    """The count with all that is pending; waits for the device."""
    if not pending:
        return count
    judged = torch.stack(pending)
    pending.clear()
    right = int(judged[:, 0].sum())
    _, spoiled, low, high, classes = judged.amax(0).tolist()
    if -low < 0 or high >= classes:
        raise BadBatch(
            f"batches: labels reach from {-low} to {high}, but {whose} has {classes} classes from 0"
            " on; give the labels of the data that it was trained on."
        )
    if spoiled:
        raise NonFiniteActivation(
            "batches: the logits hold NaN; run the model in bfloat16 or float32, and look at its"
            " weights."
        )
    count = Count(count.batches, count.right + right, count.images)
    if record is not None:
        record.write(count)
    return count
