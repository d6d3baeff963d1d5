"""Checks that run on two processes at once, over gloo: functions, which fail by their names."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[Path], None]
RANKS = 2
# how long a rank waits for one whose check failed
PATIENCE = timedelta(seconds=60)


def on_two_ranks(checks: Sequence[Check], folder: Path) -> None:
    """Run checks one after another in one pair of processes.

    Args:
        checks: functions of a module's top level; each gets the folder, which both ranks share.
        folder: what they write to and, if it is prepared, read from.

    Raises:
        AssertionError: naming the checks that failed, with what each said on each rank.
    """
    spawn = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(_run, (list(checks), folder), nprocs=RANKS)
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    assert all(list(one) == [_name(check) for check in checks] for one in said)
    failed = [name for name in said[0] if any(one[name] for one in said)]
    reasons = [
        f"{name}, rank {rank}: {said[rank][name]}" for name in failed for rank in range(RANKS)
    ]
    assert not failed, "\n".join([f"failed: {', '.join(failed)}", *reasons])


def _name(check: Check) -> str:
    return f"{check.__module__.rpartition('.')[2]}.{check.__name__}"


def _run(rank: int, checks: list[Check], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS)
    )  # as torchrun does
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=RANKS,
        timeout=PATIENCE,
    )
    said = {}
    for check in checks:
        try:
            check(folder)
            said[_name(check)] = ""
        except Exception:  # noqa: BLE001 - the parent says which check failed, and how
            said[_name(check)] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()
