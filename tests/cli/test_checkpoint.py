"""`--checkpoint` of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from biassurgery.measure import checkpoint
from tests.cli.running import common, run, run_json


class Killed(BaseException):
    """Nothing that a command knows."""


@pytest.mark.parametrize("command", ["detect", "calibrate"])
def test_a_killed_command_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file = tmp_path / "pass"
    arguments = (command, *common(llama), "--batch-size", 2)
    whole = run_json(*arguments)
    with monkeypatch.context() as faults:
        written: list[int] = []
        write = checkpoint.write_tensors

        def dies(*what: Any) -> None:
            write(*what)
            written.append(1)
            if len(written) == 2:
                raise Killed

        faults.setattr(checkpoint, "write_tensors", dies)
        faults.setattr(checkpoint, "_SECONDS", 0.0)
        faults.setattr(checkpoint, "_SHARE", float("inf"))
        with pytest.raises(Killed):
            run(*arguments, "--checkpoint", file)
    assert file.exists()
    assert run_json(*arguments, "--checkpoint", file) == whole
    result = run(*arguments, "--checkpoint", file, "--min-ratio", 500, code=1)
    assert "error: checkpoint: " in result.output
    assert "min_ratio 1000.0 there, 500.0 here" in result.output


def test_eval_keeps_one_file_a_mode(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "table"
    arguments = ("eval", *common(llama), "--mode", "set_zero", "--mode", "set_value:value=5")
    whole = run_json(*arguments)
    assert run_json(*arguments, "--checkpoint", file) == whole
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split(".")[1] for name in names] == ["original", "set_value", "set_zero"]
    assert run_json(*arguments, "--checkpoint", file) == whole
    result = run(*arguments, "--checkpoint", file, "--max-windows", 3, "--batch-size", 1, code=1)
    assert "in these data the first one is another" in result.output
