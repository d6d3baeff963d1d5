"""What cannot be a name, and quantities that give nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import biassurgery as bs
from biassurgery.errors import BadOption
from biassurgery.extend import AttentionQuantity, BlockQuantity
from biassurgery.measure.quantities import QUANTITIES, Quantity
from tests.models import planted, tokens
from tests.state import output_of, untouched

IDS = tokens(rows=2, length=12)


@pytest.mark.parametrize("given", [3, None, [3], [None], ("q", 3)])
def test_what_to_record_and_to_count(given: Any) -> None:
    model = planted("llama")
    with untouched(model, IDS):
        with pytest.raises(BadOption, match=r"what: .*'sink_mass'"), bs.record(model, given):
            pass
        with pytest.raises(BadOption, match=r"statistics: (3|None|'q').*'sinks'"):
            bs.detect(model, IDS, statistics=given)


@pytest.fixture(params=["nothing_of_a_block", "nothing_of_an_attention"])
def kind(request: pytest.FixtureRequest) -> Iterator[type[Quantity]]:
    """A quantity that is known for the length of a test."""
    base, given = (
        (BlockQuantity, None) if request.param == "nothing_of_a_block" else (AttentionQuantity, 3)
    )
    yield type("Nothing", (base,), {"name": request.param, "of": lambda self, _: given})
    del QUANTITIES._classes[request.param]


def test_a_quantity_that_gives_no_tensor(kind: type[Quantity]) -> None:
    model = planted("llama")
    with (
        untouched(model, IDS),
        pytest.raises(
            BadOption, match=rf"{kind.name}' gave (NoneType|int) for block 0.*{kind.__name__}"
        ),
        bs.record(model, kind.name),
    ):
        output_of(model, IDS)
