"""The notebooks print what they say; `find_and_fix_smollm2` needs its model, and says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from biassurgery.data import real_models
from biassurgery.data.real_models import REAL_MODELS, model_folder
from tests.packaging.notebooks import EXAMPLES, ran, read
from tests.packaging.pages import same

NOTEBOOKS = {"find_and_fix_smollm2", "explicit_bias", "registers", "diagnosis_to_int8"}
SMOLLM2 = model_folder("smollm2")  # before a test has moved the cache
LARGEST = 150_000  # bytes, figures included


def test_there_are_four() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.ipynb")} == NOTEBOOKS
    assert all((EXAMPLES / f"{name}.ipynb").stat().st_size < LARGEST for name in NOTEBOOKS)


def check(name: str) -> None:
    """Run a notebook and compare what its cells print, and that they draw what they have drawn."""
    figures = 0
    cells = 0
    for cell in ran(read(name)):
        assert same(cell.printed, cell.shown), f"{cell.cell['source']}\nprints\n{cell.printed}"
        kinds = {output["output_type"] for output in cell.cell["outputs"]}
        assert (cell.figure is not None) == ("display_data" in kinds)
        figures += cell.figure is not None
        cells += 1
    assert figures >= 1
    assert cells >= 5


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(NOTEBOOKS - {"find_and_fix_smollm2"}))
def test_a_notebook_prints_what_it_says(name: str) -> None:
    check(name)


@pytest.mark.long
def test_the_notebook_on_smollm2() -> None:
    if not SMOLLM2.is_dir():
        pytest.skip(f"{REAL_MODELS['smollm2'].title} is not in {SMOLLM2.parent}: make real-model")
    check("find_and_fix_smollm2")


def test_without_smollm2_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_models, "model_folder", lambda name: tmp_path / name)
    printed = [cell.printed for cell in ran(read("find_and_fix_smollm2"))]
    assert printed[0].startswith("SmolLM2 is not in the cache: `biassurgery fetch smollm2`")
    values = dict(re.findall(r"^\s+(\w+)\s+([\d.,]+)$", "\n".join(printed), re.M))
    assert float(values["set_zero"]) > 1.5 * float(values["original"])
    assert float(values["set_mean"]) == pytest.approx(float(values["original"]), rel=0.01)
    assert printed[-1] == "bitwise what it was: True"
