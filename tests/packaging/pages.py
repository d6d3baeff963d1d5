"""Pages whose code runs as it stands and prints what stands below it.

`python -m tests.packaging.pages PAGE ...` runs pages and writes what they print into them.

A page is Markdown. A block of ```python is run, its warnings and its refusal are printed; one whose
title is the name of a file is written to that file; a block of ```sh is run by the shell. The block
of ```text behind it is what came out, with `...` for what may be anything. All blocks of a page
share one namespace, which begins with that of the page `tasks/index.md`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from biassurgery.data.packaged import packaged_text
from tests.gguf_files import write_gguf

DOCS = Path(__file__).parents[2] / "docs"
FIRST = "tasks/index.md"
RUN = ("python", "sh")
TOLERANCE = 0.02
_FENCE = re.compile(r'```(python|sh|text)(?: title="([^"]*)")?\n(.*?)```', re.S)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def _continuations() -> None:
    """A task of the harness: how likely is the eighth word of a piece of text?"""
    words = packaged_text("evaluation").split()
    pieces = [words[at : at + 8] for at in range(0, 1600, 16)]
    rows = [{"q": " ".join(piece[:7]), "a": " " + piece[7]} for piece in pieces]
    Path("tasks").mkdir()
    data = Path("tasks/rows.jsonl").absolute()
    data.write_text("\n".join(map(json.dumps, rows)))
    Path("tasks/continuation.yaml").write_text(
        "task: continuation\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{a}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: perplexity\n"
    )


PREPARED: dict[str, Callable[[], Any]] = {
    "tasks/lm-eval.md": _continuations,
    "tasks/gguf.md": lambda: write_gguf(Path("model.gguf")),
}


class Ran(NamedTuple):
    """A block that was run: what it printed, and what the page says; None: nothing."""

    code: str
    printed: str
    shown: str | None


def ran(page: str) -> Iterator[Ran]:
    """Run a page in the current folder, block by block."""
    PREPARED.get(page, lambda: None)()
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    if page != FIRST:
        for code in re.findall(r"```python\n(.*?)```", (DOCS / FIRST).read_text(), re.S):
            _captured(_python(code, FIRST, names), fails=False)
    blocks = [match.groups() for match in _FENCE.finditer((DOCS / page).read_text())]
    for (kind, title, code), following in zip(blocks, [*blocks[1:], ("", "", "")]):
        shown = following[2] if following[0] == "text" else None
        if kind not in RUN:
            continue
        if title and title.endswith(".py"):
            Path(title).write_text(code)
            continue
        run = _shell(code) if kind == "sh" else _python(code, page, names)
        yield Ran(code, _captured(run, fails=shown is not None), shown)


def _python(code: str, page: str, names: dict[str, Any]) -> Callable[[], None]:
    return lambda: exec(compile(code, page, "exec"), names)


def _shell(code: str) -> Callable[[], None]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run() -> None:
        done = subprocess.run(
            code, shell=True, capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        sys.stdout.write(done.stdout)

    return run


def _captured(run: Callable[[], None], *, fails: bool) -> str:
    """What it prints, then its warnings, then the error that it may end in."""
    out = io.StringIO()
    last = ""
    with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            run()
        except Exception as error:
            if not fails:
                raise
            last = "".join(traceback.format_exception_only(error)).rpartition("errors.")[2]
    said = [f"UserWarning: {each.message}\n" for each in given if each.category is UserWarning]
    return "\n".join(line.rstrip() for line in "".join([out.getvalue(), *said, last]).splitlines())


def same(printed: str, shown: str) -> bool:
    """Whether the words are the same, and the numbers nearly, whatever the line breaks."""
    parts = []
    numbers = []
    for word in shown.split():
        if word == "...":
            parts.append(".*?")
            continue
        at = 0
        part = ""
        for number in _NUMBER.finditer(word):
            part += re.escape(word[at : number.start()]) + f"({_NUMBER.pattern})"
            numbers.append(number.group())
            at = number.end()
        parts.append(part + re.escape(word[at:]))
    found = re.fullmatch(" ".join(parts), " ".join(printed.split()), re.S)
    return found is not None and all(map(_near, found.groups(), numbers))


def _near(one: str, other: str) -> bool:
    """Within 2 %, or one of the last decimal."""
    decimals = len(other.partition(".")[2])
    unit = 10.0**-decimals if decimals else 0.0
    value, wanted = (float(number.replace(",", "")) for number in (one, other))
    return abs(value - wanted) <= max(TOLERANCE * abs(wanted), 1.01 * unit)


def write(page: str) -> None:
    """Put what a page prints into it, except where it says `...`."""
    text = (DOCS / page).read_text()
    for each in ran(page):
        if each.shown is None or "..." in each.shown:
            continue
        lines = each.printed.strip("\n").splitlines()
        wrapped = [part for line in lines for part in textwrap.wrap(line, 100) or [""]]
        wide = all("  " not in line.strip() for line in lines)  # tables are not wrapped
        block = "\n".join(wrapped if wide else lines)
        old = f"{each.code}```\n\n```text\n{each.shown}```"
        assert text.count(old) == 1, each.code
        text = text.replace(old, f"{each.code}```\n\n```text\n{block}\n```")
    (DOCS / page).write_text(text)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            write(page)
