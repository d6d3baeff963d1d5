"""Processes that measure together, and what tests want of them."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from biassurgery.errors import RankFailed
from biassurgery.measure import exchange

PATIENCE = 90.0  # seconds within which all is over, on a busy machine too


def run_ranks(scenes: Callable[[int], None], folder: Path, world: int = 2, port: int = 0) -> Any:
    """Run `scenes(rank)` in processes that found each other; returns their exit codes.

    They meet by a file or, with a port, by a TCP store in the first of them.
    """
    how = f"tcp://127.0.0.1:{port}" if port else f"file://{folder}/meeting"
    context = torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        _worker, (how, world, scenes), nprocs=world, join=False
    )
    for process in context.processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    for path in map(Path, context.error_files):
        if path.exists():
            raise AssertionError(pickle.loads(path.read_bytes()))
    return [process.exitcode for process in context.processes]


def _worker(rank: int, how: str, world: int, scenes: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=how, rank=rank, world_size=world, timeout=limit)
    scenes(rank)
    dist.destroy_process_group()


def same(found: Any, wanted: Any, at: str = "") -> None:
    """Assert that two results are one: counts exactly, other numbers to 1e-6."""
    if isinstance(wanted, (int, str, bool, type(None))):
        assert found == wanted, at
    elif isinstance(wanted, float):
        torch.testing.assert_close(
            torch.tensor(found),
            torch.tensor(wanted),
            rtol=1e-6,
            atol=1e-6,
            equal_nan=True,
            msg=lambda text: f"{at}: {text}",
        )
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), at
        for name in wanted:
            same(found[name], wanted[name], f"{at}.{name}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), at
        for index, (one, other) in enumerate(zip(found, wanted)):
            same(one, other, f"{at}[{index}]")
    else:
        same(vars(found), vars(wanted), f"{at}{type(wanted).__name__}")


def raised(call: Callable[[], Any]) -> BaseException:
    """What a call raises, within a time in which nobody waited for anybody."""
    started = time.monotonic()
    with pytest.raises(BaseException) as seen:  # noqa: PT011 the caller looks at it
        call()
    assert time.monotonic() - started < PATIENCE / 3
    return seen.value


def fails(
    rank: int, failing: int, error: type[BaseException], words: str, call: Callable[[], Any]
) -> None:
    """Assert that a call raises an error on one rank, and on the other one that names it."""
    seen = raised(call)
    if rank == failing:
        assert type(seen) is error, seen
        assert words in str(seen)
    else:
        assert type(seen) is RankFailed, seen
        assert f"rank {failing} failed in" in str(seen)
        assert f"{error.__name__}: {words}" in str(seen)


def refused(error: type[Exception], words: tuple[str, ...], call: Callable[[], Any]) -> None:
    """Assert that a call raises one error, here as on the other rank."""
    seen = raised(call)
    assert type(seen) is error, seen
    assert all(word in str(seen) for word in words), seen


def then(error: BaseException, *batches: Any) -> Iterator[Any]:
    """A loader that yields batches, and then fails."""
    yield from batches
    raise error


def killed(*batches: Any) -> Iterator[Any]:
    """A loader that yields batches, and then its process is killed."""
    yield from batches
    os.kill(os.getpid(), signal.SIGKILL)


def slow(seconds: float, *batches: Any) -> Iterator[Any]:
    """A loader that takes its time."""
    for batch in batches:
        time.sleep(seconds)
        yield batch


def be_impatient() -> None:
    """Ten seconds of silence are enough, which a process that has to wait for a core may need."""
    exchange.BEAT = 0.1
    exchange.SILENCE = 10.0
