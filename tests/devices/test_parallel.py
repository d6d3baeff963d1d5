"""Models that two processes share, over gloo on the CPU: tensor parallelism, FSDP2 and DDP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import data_parallel_checks, tensor_parallel_checks
from tests.devices.ranks import on_two_ranks
from tests.devices.tensor_parallel_checks import prepare


def test_two_processes(tmp_path: Path) -> None:
    prepare(tmp_path)
    checks = (*tensor_parallel_checks.FAST, *data_parallel_checks.FAST)
    on_two_ranks(checks, tmp_path)


@pytest.mark.long
def test_every_mode_on_two_processes(tmp_path: Path) -> None:
    prepare(tmp_path)
    checks = (*tensor_parallel_checks.LONG, *data_parallel_checks.LONG)
    on_two_ranks(checks, tmp_path)
