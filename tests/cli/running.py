"""Commands, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from biassurgery.cli import app

LENGTH = 32
CPU = ("--device", "cpu")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(run(*arguments, "--json").stdout, parse_constant=refuse)


def common(llama: Path) -> tuple[object, ...]:
    return llama, "--text", llama / "text.txt", "--length", LENGTH, *CPU
