"""The paper-to-command map: its code and its commands run as they stand; its pictures are there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests import models
from tests.checkpoints import checkpoint, tokenizer
from tests.cli.running import run
from tests.packaging.test_documents import DOCS, run_page

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")
PAPER = (DOCS / "paper.md").read_text()
EXAMPLES = DOCS.parent / "examples"
# Tables and figures of the slides, as the map names them.
OF_THE_SLIDES = (
    "Figures 1, 2, 3",
    "Table 1",
    "Figure 4",
    "which tokens",
    "outlier features",
    "Table 2",
    "Table 3 (perplexity",
    "Table 3 (zero-shot",
    "Figures 5, 6",
    "StreamingLLM's figure 4",
    "Figure 7",
    "the decomposition",
    "Equation 3",
    "Figures 9, 10",
    "Figure 11",
    "Figure 13",
    "Table 4",
    "Registers, figure 1",
    "Figure 14",
    "Figure 16",
    "Table 5",
)


def test_the_calls_of_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "biassurgery.plots.figures._DPI", 30
    )  # what is drawn is looked at elsewhere
    pictures = models.images(4)
    names: dict[str, Any] = {
        "model": models.planted("llama"),
        "tokenizer": tokenizer(bos=True),
        "batches": [models.tokens(seed=1), models.tokens(seed=2)],
        "ids": models.tokens(rows=1),
        "vit": models.planted_vit(reg_tokens=2),
        "images": pictures,
        "loader": [(pictures, torch.zeros(4, dtype=torch.long))],
    }
    run_page("paper.md", names)
    drawn = set(re.findall(r'savefig\("(.*?)"\)', PAPER))
    assert drawn == {file.name for file in tmp_path.iterdir()}
    assert names["diagnosis"].super_weights
    assert bs.patches(names["model"]) == bs.patches(names["vit"]) == ()


@pytest.mark.long
def test_the_commands_of_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert", reason="needs vl-convert-python (the report extra)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    folder = tmp_path / "MODEL"
    folder.mkdir()
    checkpoint(folder, bos=True)
    (tmp_path / "text.txt").write_text(packaged_text("evaluation")[:2000])
    commands = [shlex.split(each) for each in re.findall(r"```sh\n(.*?)\n```", PAPER, re.S)]
    assert [command[0] for command in commands] == ["python", "biassurgery", "biassurgery"]
    small = ("--text", "text.txt", "--length", 24, "--max-windows", 8, "--device", "cpu")
    for command in commands[1:]:
        run(*command[1:], *small)
    assert Path("report.html").stat().st_size > 0
    import paper_figures

    monkeypatch.setattr(sys, "argv", [*commands[0][1:], "--length", "24"])
    paper_figures.main()
    assert {file.name for file in Path("figures").iterdir()} == set(
        re.findall(r"pictures/paper/(\w+\.png)", PAPER)
    )


def test_every_table_and_figure_of_the_slides_has_a_row() -> None:
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in PAPER.splitlines() if line[:1] == "|"
    ]
    for name in OF_THE_SLIDES:
        assert sum(row.startswith(name) for row in rows) == 1, name


@pytest.mark.parametrize("page", ["paper.md", "gallery.md"])
def test_pictures_are_there_and_small(page: str) -> None:
    named = set(re.findall(r"\]\((pictures/[\w/.-]+)\)", (DOCS / page).read_text()))
    assert named
    for name in named:
        assert 0 < (DOCS / name).stat().st_size < 600_000, name


def test_the_page_on_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"bs": bs, "model": models.planted("llama"), "batches": [models.tokens()]}
    run_page("sinks.md", names)
    assert Path("sinks.png").stat().st_size > 0
    assert sum(names["kinds"].counts.values()) == models.LAYERS * models.HEADS
