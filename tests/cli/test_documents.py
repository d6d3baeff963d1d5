"""docs/cli.md: its commands run as they stand, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from biassurgery.cli import app
from biassurgery.data.packaged import packaged_text
from tests.checkpoints import checkpoint
from tests.cli.running import run

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("model"), bos=True)
    Path("book.txt").write_text(packaged_text("evaluation")[:4000])
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "biassurgery"
        assert run(*arguments, "--device", "cpu").stdout
    written = {path.name for path in tmp_path.iterdir()}
    assert "report.html" in written
    for name in ("diagnosis", "sites", "key_values", "record", "patched"):
        assert f"{name}.safetensors" in written
    assert (tmp_path / "my_patch" / "surgery.safetensors").is_file()


def test_the_page_tells_of_every_command_and_option() -> None:
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert told == names
    used = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    options = "".join(run(name, "--help").stdout for name in told)
    assert {option for option in used if option not in options} <= {"--help"}
