"""Every causal-LM type of the installed transformers against the committed outcome, so that the
list stays true in both directions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.census import expected
from tests.census.examine import examine
from tests.census.situations import RIGHT, situations

CENSUS = Path(__file__).parent
REPOSITORY = CENSUS.parents[1]
AGAIN = (
    "the committed outcome is out of date: run `python -m tests.census --write` and look at the"
    " difference"
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", expected.TYPES)
def test_type(model_type):
    committed = expected.read()
    verdict = examine(model_type)  # fails if the library serves it wrongly
    if committed["transformers"] != transformers.__version__:
        # another release serves other types, and `constraints.txt` has the one that was written
        # down
        return
    assert verdict.built is (model_type not in committed["not_built"]), f"{AGAIN}; {verdict.reason}"
    if verdict.built:
        assert verdict.reason == committed["not_served"].get(model_type), AGAIN
        assert verdict.attention == committed["attention_not_served"].get(model_type), AGAIN


# Of every kind of positions some: tables, rotations, whole models, recurrent layers, ALiBi, images.
SAMPLE = (
    "bamba",
    "codegen",
    "deepseek_v4",
    "falcon",
    "gemma3",
    "gpt2",
    "gptj",
    "llama",
    "mllama",
    "mpt",
    "opt",
    "phi4_multimodal",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.long)
        for name in expected.TYPES
    ],
)
def test_in_situations(model_type):
    """With a mask, behind padding, continuing a cache: right, or refused."""
    committed = expected.read()
    if model_type in {**committed["not_built"], **committed["not_served"]}:
        assert model_type not in committed["kv"]
        return
    found = situations(model_type)  # fails if a number is wrong
    assert all(cell == RIGHT or cell.startswith("refused: ") for cell in found.values())
    if committed["transformers"] == transformers.__version__:
        assert found == {mode: committed[mode][model_type] for mode in expected.MODES}, AGAIN


def test_goal():
    """At least 95 % of the types that can be built are served."""
    committed = expected.read()
    not_built, not_served = (
        len(set(committed[name]) & set(expected.TYPES)) for name in ("not_built", "not_served")
    )
    built, _, percent = expected.share(not_built, not_served)
    assert built > 100
    assert percent >= 95.0


@pytest.mark.parametrize("major", [4, 5])
def test_the_documentation_has_the_committed_numbers(major):
    committed = json.loads((CENSUS / f"transformers_{major}.json").read_text())
    served = len(committed["kv"])
    row = next(
        line.split("|")
        for line in (REPOSITORY / "docs" / "census.md").read_text().splitlines()
        if line.startswith(f"| {committed['transformers']} |")
    )
    _, _, _, built, said, share, *rest, _ = (cell.strip() for cell in row)
    right = [
        sum(cell == RIGHT for cell in committed[name].values()) for name in ("kv", "transplant")
    ]
    attention = served - len(committed["attention_not_served"])
    assert int(built) == served + len(committed["not_served"])
    assert (int(said), share) == (served, f"{100 * served / int(built):.1f} %")
    assert list(map(int, rest)) == [attention, *right]
    support = " ".join((REPOSITORY / "docs" / "support.md").read_text().split())
    assert f"{served} of {built}" in support
    assert str(attention) in support.partition("with modes on attention ")[2][:20]
