"""The loop that all accuracies share: the largest logit of each image against its label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from biassurgery.adapters.registry import Host
from biassurgery.data.batches import warn_of_repeats
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation
from biassurgery.evaluate.labelled import LabelledBatch, labelled
from biassurgery.evaluate.resume import Count, CountFile
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.fingerprint import digest_of, facts_of
from biassurgery.measure.progress import count_of
from biassurgery.measure.ranks import Ranks
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step

_SECONDS = 5.0  # between two looks at the counts, each of which waits for the device


def accuracy(
    ranks: Ranks,
    host: Host,
    batches: Iterable[LabelledBatch],
    logits: Callable[[dict[str, Any]], Tensor],
    *,
    name: str,
    progress: bool | None,
    resume: str | Path | None = None,
    checkpoint: str | Path | None = None,
    head: tuple[Any, ...] = (),
    whose: str = "the model",
) -> float:
    """Share, 0 to 1, of images whose largest logit is that of their label.

    Args:
        ranks: whose images are counted.
        host: the model.
        batches: pairs of images and labels.
        logits: from a batch's inputs to (B, C).
        name: of the measure, for the progress bar and the file.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        resume: a JSON file to keep the counts in, see `CountFile`; None: nothing is kept.
        checkpoint: a file for this pass alone, see `checkpointed`; None: there is none.
        head: what else the logits depend on, tensors and names, so that both can tell.
        whose: classes the logits are of, for messages.

    Raises:
        BadBatch: no batches, one that is no pair, or labels beyond the classes.
        BadOption: `resume` with a loader that shuffles, or that is shorter than what is counted;
            `checkpoint` with one that shuffles, or both; either with weights on the meta device.
        FileError: `resume` or `checkpoint` cannot be read or written, or is another file.
        NonFiniteActivation: NaN in the logits.
    """
    _check_order(batches, resume, checkpoint)
    told = digest_of(head).hex()
    ranks.same(head=told)
    pairs = ranks.apart(with_bar(batches, name, progress))
    first = next(pairs, None)
    if first is None:
        raise BadBatch("batches: there are none; give at least one pair of images and labels.")
    file = None
    if resume is not None:
        (as_read,) = labelled(host, [first])
        key = digest_of((name, facts_of(host, "resume"), as_read, told)).hex()
        file = CountFile(resume, key, name, host.root)
    counting = _Counting(Count() if file is None else file.read(), file, whose)
    rest = labelled(host, _rest(batches, chain([first], pairs), counting.count.batches, resume))
    kept = checkpointed(rest, checkpoint, name, host, counting, batches=batches, head=told)
    with reading(host.root, eager=False):
        for inputs, labels in in_step(kept, host.root):
            counting.add(logits(inputs), labels)
    counting.settle()
    count = counting.count
    right, images = ranks.total(torch.tensor([count.right, count.images])).tolist()
    return right / images


def _rest(batches: Any, pairs: Iterable[Any], counted: int, resume: object) -> Iterable[Any]:
    """The pairs that the file of `resume` has not counted."""
    there = count_of(batches)
    if there is not None and there < counted:
        raise BadOption(
            f"resume: {resume} has counted {counted} of these batches, but there are"
            f" {there}; use another file."
        )
    # Where all are known to be counted, none needs to be read again.
    return () if there == counted else islice(pairs, counted, None)


def _check_order(batches: Any, resume: str | Path | None, checkpoint: str | Path | None) -> None:
    """Refuse to resume where nobody knows which images are counted; warn of those twice there."""
    warn_of_repeats(batches)
    if resume is not None and checkpoint is not None:
        raise BadOption(
            f"checkpoint: {checkpoint}, but also resume: {resume}; give one of the two."
        )
    if resume is not None and isinstance(getattr(batches, "sampler", None), RandomSampler):
        raise BadOption(
            f"resume: {resume}, but the loader shuffles, so that nobody knows which images are"
            " counted; pass shuffle=False."
        )


class _Counting:
    """Counts right answers.

    What the logits of a batch say stays on the device as five numbers, which are fetched together
    every few seconds, so that the next batch need not wait for them:

        right  NaN  -smallest label  largest label  classes
            3    0               -1              9       10
            4    0               -0              7       10
        sum 7    largest: 0, -0, 9, 10: no NaN, labels from 0 to 9, of 10 classes

    Args:
        count: what was counted before.
        file: where to keep the count; None: nowhere.
        whose: classes the logits are of, for messages.
    """

    def __init__(self, count: Count, file: CountFile | None, whose: str) -> None:
        self.count = count  # its `right` is without what is pending
        self.file = file
        self.whose = whose
        self._pending: list[Tensor] = []
        self._settled_at = time.monotonic()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (B, C), labels (B,)."""
        self._pending.append(_judged(logits, labels, self.whose))
        before = self.count
        self.count = Count(before.batches + 1, before.right, before.images + len(labels))
        if time.monotonic() - self._settled_at >= _SECONDS:
            self.settle()

    def state(self) -> dict[str, int]:
        """The count, for a checkpoint; waits for the device."""
        self.settle()
        return asdict(self.count)

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from such a count."""
        self.count = Count(**state)

    def settle(self) -> None:
        """Fetch what is pending, check it and count it; waits for the device."""
        if not self._pending:
            return
        judged = torch.stack(self._pending)
        self._pending.clear()
        right = int(judged[:, 0].sum())
        _, has_nan, minus_smallest, largest, classes = judged.amax(0).tolist()
        if minus_smallest > 0 or largest >= classes:
            raise BadBatch(
                f"batches: labels reach from {-minus_smallest} to {largest}, but {self.whose} has"
                f" {classes} classes from 0 on; give the labels of the data that it was trained on."
            )
        if has_nan:
            raise NonFiniteActivation(
                "batches: the logits hold NaN; run the model in bfloat16 or float32, and look at"
                " its weights."
            )
        self.count = Count(self.count.batches, self.count.right + right, self.count.images)
        if self.file is not None:
            self.file.write(self.count)
        self._settled_at = time.monotonic()


def _judged(logits: Tensor, labels: Tensor, whose: str) -> Tensor:
    """(5,) int64 on the device, one row of the table of `_Counting`."""
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
