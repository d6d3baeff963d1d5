"""What `compare` hands to the evaluation of each row: a checkpoint, a start token."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from biassurgery.errors import BadOption
from biassurgery.findings.files import as_path
from biassurgery.modes import Mode

_EXAMPLE = "lambda model, {0}: perplexity(model, batches, {1})"


class Handed:
    """An evaluation, and what each row's gets by name.

    Args:
        evaluate: what the user gave.
        checkpoint: a name for files, one a row; None: there are none.
        start: a token that the evaluation puts in front; None: there is none.
    """

    def __init__(
        self, evaluate: Callable[..., Any], checkpoint: str | Path | None, start: int | None
    ) -> None:
        if not callable(evaluate):
            raise BadOption(
                f"evaluate: a {type(evaluate).__name__}; give a function of the model that returns"
                " a number, such as lambda m: bs.perplexity(m, batches)."
            )
        self.path = None if checkpoint is None else as_path("checkpoint", checkpoint)
        self.evaluate = evaluate
        self.start = start
        self._check_takes()

    def evaluation_of(self, label: str, mode: Mode | None) -> Callable[[Any], Any]:
        """The evaluation of a row.

        Its file is called by the mode's name and, if it has options, a hash of these. A mode that
        has the start token in its attention gets none.
        """
        handed: dict[str, Any] = {}
        if self.path is not None:
            name = label if mode is None else mode.name
            options = "" if label == name else f".{hashlib.sha256(label.encode()).hexdigest()[:8]}"
            handed["checkpoint"] = self.path.with_name(f"{self.path.name}.{name}{options}")
        if self.start is not None:
            replaced = mode is not None and mode.replaces_start
            handed["start"] = None if replaced else self.start
        return partial(self.evaluate, **handed) if handed else self.evaluate

    def _check_takes(self) -> None:
        given = {"checkpoint": self.path, "start": self.start}
        names = [name for name, value in given.items() if value is not None]
        try:
            inspect.signature(self.evaluate).bind("model", **dict.fromkeys(names))
        except TypeError as error:
            if not names:
                return  # it is called with the model alone, and says itself what it misses
            example = _EXAMPLE.format(", ".join(names), ", ".join(f"{n}={n}" for n in names))
            raise BadOption(
                f"evaluate: it cannot be called with (model, {', '.join(names)}) ({error}); write"
                f" {example}, or leave {'= and '.join(names)}= out."
            ) from error
