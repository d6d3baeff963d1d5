"""Every type of the installed transformers that reads images against the committed outcome, so that
the list stays true in both directions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.census.vision_examine import CELLS, RIGHT, TYPES, examine, read, totals, written

CENSUS = Path(__file__).parent
DOCUMENT = CENSUS.parents[1] / "docs" / "census.md"
AGAIN = (
    "the committed outcome is out of date: run `python -m tests.census --vision --write` and look"
    " at the difference"
)
# Of every kind of tokens, towers and refusals some.
SAMPLE = ("deit", "depth_anything", "got_ocr2", "llava", "qwen2_5_vl", "siglip2", "swin", "yolos")
NAMED = {  # what users ask for: all of these are served, in both versions
    "aimv2_vision_model",
    "beit",
    "blip",
    "clipseg",
    "data2vec-vision",
    "deit",
    "depth_anything",
    "dpt",
    "ijepa",
    "llava",
    "owlvit",
    "siglip2",
    "vit_msn",
    "yolos",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.long) for name in TYPES],
)
def test_type(model_type: str) -> None:
    outcome = examine(model_type)  # fails if a number is wrong
    committed = read()
    if committed["transformers"] != transformers.__version__:
        return
    found = written({model_type: outcome})
    if outcome.built:
        for kind in ("refused", "served"):
            assert found[kind].get(model_type) == committed[kind].get(model_type), AGAIN
    else:
        assert model_type in committed["not_built"], f"{AGAIN}; {outcome.refused}"


def test_what_is_committed() -> None:
    committed = read()
    assert committed["served"].keys() >= NAMED
    for row in committed["served"].values():
        assert row["activations"] == row["planted"] == RIGHT
        assert all(row[cell] == RIGHT or row[cell].startswith("refused: ") for cell in CELLS)
        assert "patch" in row["roles"].split(", ")


@pytest.mark.parametrize("major", [4, 5])
def test_the_documentation_has_the_committed_numbers(major: int) -> None:
    committed = json.loads((CENSUS / f"vision_{major}.json").read_text())
    _, _, after = DOCUMENT.read_text().partition("# Which vision models of transformers are served")
    row = next(
        line.split("|")
        for line in after.splitlines()
        if line.startswith(f"| {committed['transformers']} |")
    )
    types, built, served, by_name, _, _, attention, registers = totals(committed)
    wanted = [types, built, served, by_name, attention, registers]
    assert [int(cell) for cell in row[2:-1]] == wanted
