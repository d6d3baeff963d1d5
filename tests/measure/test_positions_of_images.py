"""Positions along the axes of an image, (3, B, T): their rows are not along the first axis."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.measure.kept import rows_of
from tests.whole_models import START, whole_model

LENGTH = 12


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_given_or_made_they_are_the_same(rows: int) -> None:
    model = whole_model("qwen2_vl")
    ids = torch.randint(10, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = START
    made = {"input_ids": ids}
    given = {**made, "position_ids": torch.arange(LENGTH).expand(3, rows, LENGTH)}
    sites = bs.calibrate(model, made, progress=False)
    assert list(sites)
    assert bs.calibrate(model, given, progress=False) == sites
    wanted = bs.detect(model, made, progress=False)
    found = bs.detect(model, given, progress=False)
    assert found.sinks is not None
    assert str(found) == str(wanted)  # they hold NaN, which is not itself


def test_rows_are_cut_along_their_own_axis() -> None:
    ids = torch.arange(20).view(4, 5)
    for positions, wanted in (
        (torch.randn(3, 4, 5), lambda given: given[:, [2, 0]]),
        (torch.randn(3, 1, 5), lambda given: given),  # for all rows
        (torch.randn(4, 5), lambda given: given[[2, 0]]),
        (torch.randn(5), lambda given: given),
    ):
        chosen = rows_of({"input_ids": ids, "position_ids": positions}, [2, 0, 4])
        assert torch.equal(chosen["input_ids"], ids[[2, 0]])
        assert torch.equal(chosen["position_ids"], wanted(positions))
