"""Zero-shot tasks through lm-evaluation-harness, on a model that is patched in place.

Source: Sun et al. 2024, table 3, whose last column is the mean accuracy on such tasks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biassurgery.errors import BadOption, FileError, MissingPackage, UnsupportedModel, first_line

MEAN = "mean"
_LOGGER = "lm_eval"
_NOISY = (_LOGGER, "lm-eval", "datasets", "transformers")


class TaskScores:
    """Accuracies on tasks of lm-evaluation-harness, read with the windows' own start token.

    The harness adds a BOS only where a tokenizer does by itself. A model that was calibrated behind
    a start token, or without one, has to be asked the same way: without its BOS, the perplexity of
    one that needs it is in the billions (lm-evaluation-harness, issue 1465).

    Args:
        names: of the tasks.
        tokenizer: the model's.
        front: the token ids in front of every question; none: nothing is added.
        folder: of further task files; None: the harness's own.
        shots: examples before each question.
        limit: questions a task at most; None: all.
        batch_size: questions a forward.

    Raises:
        MissingPackage: lm-evaluation-harness is not installed.
        BadOption: a task that is not known.
        FileError: a task whose data cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: Any,
        *,
        front: Sequence[int] = (),
        folder: str | Path | None = None,
        shots: int = 0,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.names = list(names)
        self.tokenizer = tokenizer
        self.front = tuple(front)
        self.shots = shots
        self.limit = limit
        self.batch_size = batch_size
        with _quiet():
            self._manager = _manager_of(self.names, folder)
            _check_loads(self._manager, self.names)

    def of(self, model: Any, front: Sequence[int] | None = None) -> dict[str, float]:
        """The accuracy on each task, from 0 to 1, and their mean if there are several.

        Args:
            model: a causal language model of transformers, with its patches.
            front: other token ids in front of every question; None: those of the others.

        Raises:
            UnsupportedModel: it is no such model.
        """
        if not hasattr(model, "config") or not hasattr(model, "generate"):
            raise UnsupportedModel(
                f"model: {type(model).__name__}; tasks need a language model of transformers."
            )
        with _quiet():
            training = model.training
            found = _harness("lm_eval.evaluator").simple_evaluate(
                model=_wrapped(
                    model.eval(),
                    self.tokenizer,
                    self.front if front is None else tuple(front),
                    self.batch_size,
                ),
                tasks=list(self.names),
                task_manager=self._manager,
                num_fewshot=self.shots,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=None,  # the caller's generators stay as they are
                numpy_random_seed=None,
                torch_random_seed=None,
            )
            model.train(training)
        scores = {name: _score(found["results"][name]) for name in self.names}
        return scores if len(scores) == 1 else scores | {MEAN: sum(scores.values()) / len(scores)}


def _score(results: dict[str, Any]) -> float:
    """A task's accuracy, or its first number if it has none."""
    numbers = {
        name.split(",")[0]: value
        for name, value in results.items()
        if isinstance(value, float | int) and "," in name and "_stderr" not in name
    }
    return float(numbers.get("acc", next(iter(numbers.values()))))


def _harness(module: str) -> Any:
    """A module of lm-evaluation-harness."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"tasks: lm-evaluation-harness cannot be imported ({first_line(error)}); pip install"
            " 'biassurgery[eval]'."
        ) from error


def _manager_of(names: Sequence[str], folder: str | Path | None) -> Any:
    """What knows the tasks: of the folder alone, if that has them all, for it is far quicker."""
    TaskManager = _harness("lm_eval.tasks").TaskManager
    if folder is not None:
        if not Path(folder).is_dir():
            raise FileError(f"task_path: {folder} is not a folder; give one with task files.")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise BadOption(
            f"tasks: {', '.join(unknown)} not known to lm-evaluation-harness; `lm_eval ls tasks`"
            " lists what is."
        )
    return manager


def _check_loads(manager: Any, names: list[str]) -> None:
    try:
        manager.load(names)
    except Exception as error:  # task files and data sets raise anything
        raise FileError(
            f"tasks: {', '.join(names)} cannot be loaded ({first_line(error)}); check the task"
            " files and the connection to the hub."
        ) from error


def _wrapped(model: Any, tokenizer: Any, front: tuple[int, ...], batch_size: int) -> Any:
    """The model as the harness takes it, with a policy of its own for start tokens."""
    HFLM: Any = _harness("lm_eval.models.huggingface").HFLM

    class Wrapped(HFLM):
        """Puts the same token ids in front of every question."""

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **options: Any,
        ) -> list[int]:
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            if left_truncate_len:
                ids = ids[-left_truncate_len:]
            return ids if add_special_tokens is False else [*front, *ids]

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[Tensor, Tensor]:
            keep = None if left_truncate_len is None else left_truncate_len - len(front)
            rows = [self.tok_encode(string, left_truncate_len=keep) for string in strings]
            return _padded(rows, self.tokenizer.pad_token_id, padding_side)

    # It gives the tokenizer a padding token.
    own = copy.deepcopy(tokenizer)
    prefix = {"prefix_token_id": front[-1]} if front else {}
    return Wrapped(
        pretrained=model,
        tokenizer=own,
        backend="causal",
        batch_size=batch_size,
        add_bos_token=bool(front),
        **prefix,
    )


def _padded(rows: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64 of rows, and their mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block the harness logs errors only."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
