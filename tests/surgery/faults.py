"""A driver that makes the n-th call inside the library fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import biassurgery

PACKAGE = str(Path(biassurgery.__file__).parent)


class Broken(Exception):
    """What a fault raises: an error that nothing in the library expects."""


class Interrupted(KeyboardInterrupt):
    """What a fault raises: Ctrl-C."""


@contextmanager
def fault(at: int | None, error: type[BaseException]) -> Iterator[list[int]]:
    """Within the block, the call number `at` (from 1) of a function, generator or list
    comprehension of the library raises `error` as it begins; None: none does. Yields a list that
    counts the calls.
    """
    calls = [0]

    def on_call(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # A generator expression that is dropped half-way is called once more to be closed, where
        # Python ignores what it raises.
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<genexpr>":
            calls[0] += 1
            if calls[0] == at:
                where = code.co_filename.removeprefix(PACKAGE)
                raise error(f"at call {at}, {code.co_name} in {where}")

    tracing = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield calls
    finally:
        sys.settrace(tracing)


@contextmanager
def fault_at_line(at: int, error: type[BaseException], names: set[str]) -> Iterator[list[int]]:
    """Within the block, the line number `at` (from 1) that functions of these names run raises
    `error` before it is run. Yields a list that counts their lines.
    """
    lines = [0]

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines[0] += 1
            if lines[0] == at:
                raise error(f"at line {frame.f_lineno} of {frame.f_code.co_name}")
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE) and code.co_name in names
        return on_line if ours else None

    tracing = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield lines
    finally:
        sys.settrace(tracing)


def count_calls(action: Callable[[], Any]) -> int:
    """How many calls inside the library an action makes."""
    with fault(None, Broken) as calls:
        action()
    return calls[0]
