"""Models that two processes share, over gloo on the CPU: tensor parallelism, FSDP2 and DDP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.cases import VARIANTS
from tests.devices import data_parallel_checks, table, tensor_parallel_checks
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


def test_the_documented_table_has_every_variant() -> None:
    _, _, *rows = table.documented().splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [name for name, *_ in cells] == [f"`{variant}`" for variant in VARIANTS]
    assert {len(row) for row in cells} == {1 + len(table.COLUMNS)}
    assert {outcome for _, *outcomes in cells for outcome in outcomes} <= table.OUTCOMES


@pytest.mark.long
def test_the_documented_table_is_true() -> None:
    assert table.markdown(table.table()) == table.documented()
