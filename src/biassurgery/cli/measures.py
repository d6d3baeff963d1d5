"""What `biassurgery eval` measures of a model: perplexity, accuracy, or zero-shot tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from biassurgery.cli.inputs import Inputs
from biassurgery.cli.modes import Asked
from biassurgery.cli.options import Request
from biassurgery.data.batches import IGNORED
from biassurgery.errors import BadBatch, BadOption

Measure = Callable[..., dict[str, float]]


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of lm-evaluation-harness to do: names, a folder with others, and examples."""

    names: tuple[str, ...]
    folder: Path | None
    shots: int

    @classmethod
    def read(
        cls,
        names: str | None,
        folder: Path | None,
        shots: int,
        request: Request,
        checkpoint: Path | None,
    ) -> TaskOptions | None:
        """The tasks that were asked for; None: none were.

        Raises:
            BadOption: options that do not go together.
        """
        if names is None:
            if folder is not None or shots:
                raise BadOption("tasks: none are named, but there are options for them; name some.")
            return None
        words = tuple(name.strip() for name in names.split(",") if name.strip())
        if not words:
            raise BadOption(f"tasks: {names!r} names none; write piqa,arc_easy for example.")
        if request.text or request.images is not None:
            raise BadOption("tasks: they bring their own texts; leave --text and --images out.")
        if checkpoint is not None:
            raise BadOption("checkpoint: tasks start over each time; leave it out.")
        return cls(words, folder, shots)


def measure_of(
    inputs: Inputs, asked: Sequence[Asked], tasks: TaskOptions | None, request: Request
) -> Measure:
    """What is measured of a model under each of some modes.

    Raises:
        BadBatch, BadOption: it cannot be measured on these data or this model.
    """
    if tasks is not None:
        return _tasks(inputs, tasks, request)
    if inputs.reads_text:
        return _perplexity(inputs, any(one.replaces_start for one in asked))
    return accuracy_of(inputs)


def accuracy_of(inputs: Inputs) -> Measure:
    """The top-1 accuracy of labelled images.

    Raises:
        BadBatch: they have no labels.
    """
    from biassurgery.evaluate import top1_accuracy

    if not inputs.labelled:
        raise BadBatch(
            "images: top-1 accuracy needs labels; give --images with labels.csv (columns file,"
            " class_index), or with one sub-folder for each of the model's"
            f" {getattr(inputs.host.model, 'num_classes', '')} classes."
        )

    def measure(model: Any, checkpoint: Path | None = None) -> dict[str, float]:
        return {"top1": top1_accuracy(model, inputs.batches, checkpoint=checkpoint)}

    return measure


def _perplexity(inputs: Inputs, transplanted: bool) -> Measure:
    """Of the tokens that every row of the table can score.

    Without the start token nothing predicts the first one behind it. Behind a token that `--start`
    names, `perplexity` leaves that one out by itself.
    """

    def measure(
        model: Any, checkpoint: Path | None = None, start: int | None = None
    ) -> dict[str, float]:
        batches = inputs.batches
        if transplanted and inputs.start is None:
            cut = without_start if has_no_start(model) else _behind_first
            batches = [cut(rows) for rows in inputs.batches]
        return perplexity_and_loss(model, batches, start=start, checkpoint=checkpoint)

    return measure


def perplexity_and_loss(model: Any, batches: Any, **options: Any) -> dict[str, float]:
    """The perplexity of a language model, and its logarithm: nats a token."""
    from biassurgery.evaluate import perplexity

    value = perplexity(model, batches, **options)
    return {"perplexity": value, "loss": math.log(value)}


def has_no_start(model: Any) -> bool:
    """Whether the model is to read sequences without their start token."""
    from biassurgery.patching import patches

    return any(patch.mode.replaces_start for patch in patches(model))


def without_start(rows: Tensor) -> Tensor:
    """(B, T - 1) rows without their start token."""
    return rows[:, 1:]


def _behind_first(rows: Tensor) -> dict[str, Tensor]:
    """Rows of which the first token behind the start token does not count."""
    labels = rows.clone()
    labels[:, :2] = IGNORED
    return {"input_ids": rows, "labels": labels}


def _tasks(inputs: Inputs, tasks: TaskOptions, request: Request) -> Measure:
    from biassurgery.integrations.lm_eval import TaskScores

    if not inputs.reads_text:
        raise BadOption(
            f"tasks: {inputs.model['name']} reads images; tasks are for language models."
        )
    scores = TaskScores(
        tasks.names,
        inputs.tokenizer,
        front=inputs.front,
        folder=tasks.folder,
        shots=tasks.shots,
        limit=request.limit,
        batch_size=request.batch_size,
    )

    def measure(model: Any, start: int | None = None) -> dict[str, float]:
        return scores.of(model, front=() if has_no_start(model) else inputs.front)

    return measure
