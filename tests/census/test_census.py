"""Every causal-LM type of the installed transformers against the committed outcome, so that the
list stays true in both directions.
"""

from __future__ import annotations

import pytest
import transformers

from tests.census import expected
from tests.census.examine import examine

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


def test_goal():
    """At least 95 % of the types that can be built are served."""
    committed = expected.read()
    not_built, not_served = (
        len(set(committed[name]) & set(expected.TYPES)) for name in ("not_built", "not_served")
    )
    built, _, percent = expected.share(not_built, not_served)
    assert built > 100
    assert percent >= 95.0
