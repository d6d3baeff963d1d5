"""Findings as tables."""

from __future__ import annotations

import math

import pytest
import torch

import biassurgery as bs
from biassurgery.findings import render
from tests.models import LAYER, LAYERS, planted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.44421, "0.4442"),
        (3.3541, "3.354"),
        (86.0, "86.00"),
        (-471.23, "-471.2"),
        (9871.4, "9,871"),
        (123456.7, "123,457"),
        (1.5e9, "1.500e+09"),
        (2.5e-6, "2.500e-06"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert render.number(value) == shown


def test_a_long_table_of_sites_is_cut() -> None:
    sites = bs.Sites(
        [
            bs.Site(layer, 3, "start", 1000.0 + layer, 1.0, 5, margin=7.0, cluster=layer % 2)
            for layer in range(60)
        ]
    )
    text = str(sites)
    rows = [line.split() for line in text.splitlines() if "start" in line]
    assert len(rows) == 40
    assert rows[0] == ["0", "3", "start", "1,000", "1.000", "5", "7.000x"]
    assert rows[1][2:5] == ["start,", "level", "2"]
    assert "and 20 more, up to layer 59" in text
    assert "more" not in str(sites[:40])
    assert str(bs.Sites()) == "No massive activations."


def test_detection_says_what_it_found() -> None:
    found = bs.detect(planted("llama"), [torch.tensor([[0, 5, 6, 1, 9]])])
    text = str(found)
    assert (
        text.index("Magnitudes at each block's output")
        < text.index("Massive activations by role")
        < text.index("margin")
    )
    assert "means over 1 sequences, 5 tokens" in text
    table = text[text.index("Massive activations by role") :]
    roles = [line.split() for line in table.splitlines() if "%" in line]
    layers = [str(LAYER), "to", str(LAYERS - 1)]
    assert roles[0] == [*layers, "start", "1", "1", "50.0", "%"]
