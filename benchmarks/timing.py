"""Seconds of several variants of one thing, taken in turn, and their ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seconds(run: Callable[[], object], device: str) -> float:
    """On a CPU those that this process worked, which on an idle machine are those of the clock."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def interleaved(
    timers: dict[str, Callable[[], float]], repeats: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every timer in every repeat, after one round to warm up; each repeat begins with
    another one.
    """
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm_up else ():
        timers[name]()
    for repeat in range(repeats):
        for at in range(len(names)):
            name = names[(at + repeat) % len(names)]
            times[name].append(timers[name]())
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of every timer: seconds, and median and quartiles of its ratio to `base` in the same
    repeat.
    """
    result = {}
    for name, values in times.items():
        paired = [value / reference for value, reference in zip(values, times[base], strict=True)]
        low, median, high = statistics.quantiles(paired, n=4, method="inclusive")
        result[name] = {
            "seconds": statistics.median(values),
            "ratio": median,
            "low": low,
            "high": high,
            "repeats": len(values),
        }
    return result


def verdict(row: dict[str, float], again: dict[str, float], budget: float) -> str:
    """Whether a ratio is at most `budget` above that of the unpatched model measured again:
    `passed`, `failed`, or `inconclusive` where the noise is over half of the budget.

    The noise is how far the unpatched model's own median lies from 1, or may lie by the spread of
    its quartiles.
    """
    spread = (again["high"] - again["low"]) / math.sqrt(again["repeats"])
    if max(abs(again["ratio"] - 1), spread) > budget / 2:
        return "inconclusive"
    return "passed" if row["ratio"] - again["ratio"] <= budget else "failed"
