"""The snippets of CONTRIBUTING.md run as they stand, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SNIPPETS = re.findall(r"### ([^\n]+)\n(?:(?!###).)*?```python\n(.*?)```", GUIDE.read_text(), re.S)


def test_every_kind_has_a_snippet() -> None:
    assert [title for title, _ in SNIPPETS] == [
        "A mode on massive activations",
        "A kind of explicit attention bias",
        "A quantity of `record`",
        "A statistic of `detect`",
        "A format of `export`",
        "An architecture",
    ]


@pytest.mark.long
@pytest.mark.parametrize("title", [title for title, _ in SNIPPETS])
def test_a_snippet_runs(title: str, tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(dict(SNIPPETS)[title])
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
