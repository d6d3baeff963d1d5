"""Every structure of timm's transformers against the committed outcome, so that the list stays true
in both directions.
"""

from __future__ import annotations

import pytest

from tests.census.timm_examine import examine, read, refusal, refused
from tests.census.timm_models import Structure, structures

AGAIN = (
    "the committed outcome is out of date: run `python -m tests.census --timm --write` and look at"
    " the difference"
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", structures(), ids=lambda structure: structure.names[0])
def test_structure(structure: Structure) -> None:
    committed = read()
    outcome = examine(structure)
    assert outcome.attention == committed["attention_not_served"].get(structure.text), AGAIN
    assert outcome.gate == committed["gate_not_served"].get(structure.text), AGAIN


def test_every_architecture_has_the_structure_that_is_committed() -> None:
    found = {name: structure.text for structure in structures() for name in structure.names}
    committed = {name: text for text, names in read()["structures"].items() for name in names}
    both = found.keys() & committed.keys()
    assert both
    assert {name: found[name] for name in both} == {name: committed[name] for name in both}, AGAIN


@pytest.mark.parametrize("kind", refused())
def test_what_is_not_served_is_refused(kind: str) -> None:
    names = refused()[kind]
    assert names
    assert refusal(names[0]) == read()["not_served"][kind]["reason"], AGAIN


def test_goal() -> None:
    """All vision transformers with one stream of tokens of one width are served, nearly all of them
    with modes on attention.
    """
    committed = read()
    served = sum(map(len, committed["structures"].values()))
    without = sum(len(committed["structures"][text]) for text in committed["attention_not_served"])
    assert served > 300
    assert without / served < 0.02
