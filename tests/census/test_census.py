"""Every causal-LM type of the installed transformers against the committed outcome, so that the
list stays true in both directions.
"""

from __future__ import annotations

import pytest
import transformers

from tests.census import expected
from tests.census.examine import examine
from tests.census.situations import RIGHT, situations

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
