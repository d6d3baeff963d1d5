"""The levels of a tally: which values belong, and where clusters part."""

from __future__ import annotations

import functools
import math
import operator
import random

import pytest
import torch

from biassurgery.findings.levels import CLUSTER_RATIO
from tests.findings.tallied import Value, found, tallied


def test_the_standard_deviation_survives_a_large_mean():
    """A sum of squares would lose it: 1e6 squared leaves 4 digits of a float64 for a spread of
    1e-3.
    """
    numbers = [1e6 + 1e-3 * i for i in (-2, -1, 0, 1, 2)]
    parts = [tallied([Value(0, 0, 0, x, True)], {(0, 0): 1.0}) for x in numbers]
    (level,) = found(functools.reduce(operator.add, parts))
    assert level.std == pytest.approx(1e-3 * math.sqrt(2), rel=1e-6)


def test_values_short_of_the_definition_belong_when_they_are_beyond_the_gap():
    """Channel 41 of ViT-Ti: values of 471 +- 91, few of which exceed the threshold, ordinary ones
    below 20.
    """
    draw = random.Random(2)
    massive = [draw.gauss(-471, 91) for _ in range(400)]
    values = [Value(0, 1, 1, x, abs(x) > 600) for x in massive] + [
        Value(0, 1, 1, draw.uniform(14, 20), False) for _ in range(50)
    ]
    (level,) = found(tallied(values, {(0, 1): 13.0}))
    assert sum(v.hit for v in values) < 50
    assert level.count == 400
    assert level.mean == pytest.approx(sum(massive) / 400, rel=1e-12)
    assert 20 < level.gate < min(map(abs, massive))


def test_a_channel_without_a_value_that_meets_the_definition_has_no_level():
    assert found(tallied([Value(0, 0, 0, 5000.0, False)], {(0, 0): 1.0})) == []
    values = [Value(0, 0, 0, 5000.0, False), Value(0, 2, 0, 5000.0, True)]
    assert [level.channel for level in found(tallied(values, {(0, 0): 1.0, (0, 2): 1.0}))] == [2]


def test_two_delimiters_of_one_role_and_two_signs_are_levels_of_their_own():
    groups = {(0, 3000.0): 4, (1, 2405.0): 3, (1, 8000.0): 2, (1, -2405.0): 5}
    values = [
        Value(1, 3, role, level * (1 + 0.01 * i), True)
        for (role, level), count in groups.items()
        for i in range(count)
    ]
    actual = [
        (s.role, s.cluster, round(s.mean / (1 + 0.005 * (s.count - 1))), s.count)
        for s in found(tallied(values, {(1, 3): 10.0}))
    ]
    assert actual == [(0, 0, 3000, 4), (1, 0, -2405, 5), (1, 1, 2405, 3), (1, 2, 8000, 2)]


def test_a_wider_gap_above_the_smallest_massive_value_is_not_the_gate():
    low, high = found(
        tallied([Value(0, 0, 0, 1300.0, True), Value(0, 0, 0, 20000.0, True)], {(0, 0): 300.0})
    )
    assert (low.mean, high.mean) == (1300.0, 20000.0)
    assert 300 < low.gate < 1300
    assert low.margin == pytest.approx(13 / 3)


@pytest.mark.parametrize(
    ("ratio", "clusters"), [(CLUSTER_RATIO * 0.98, 1), (CLUSTER_RATIO * 1.02, 2)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_clusters_part_at_the_ratio(ratio, clusters, sign):
    values = [Value(0, 0, 0, sign * 2000.0, True), Value(0, 0, 0, sign * 2000.0 * ratio, True)]
    assert len(found(tallied(values, {(0, 0): 1.0}))) == clusters


@pytest.mark.parametrize("sign", [1, -1])
def test_the_tail_of_a_broad_cluster_is_no_cluster(sign):
    """Values from 300 to 600 and a lone one at 190: the gap of 1.58 is smaller than the spread of 2
    beside it.
    """
    values = [Value(0, 0, 0, sign * x, x > 400) for x in (190.0, *range(300, 601, 10))]
    (level,) = found(tallied(values, {(0, 0): 10.0}))
    assert level.count == 32


def test_the_gate_stays_near_the_smallest_massive_value():
    """The middle of a gap from 0.001 to 1000 would be 1; other data may well hold a 2 in this
    channel.
    """
    (level,) = found(tallied([Value(0, 0, 0, 1000.0, True)], {(0, 0): 0.001}))
    assert level.gate == pytest.approx(250)
    assert level.margin == pytest.approx(1e6)


def test_a_channel_in_which_nothing_small_was_seen_is_divided_where_its_values_are():
    """Every token is above the floor, so nothing is known below 40; the massive value is the 3000
    all the same.
    """
    values = [Value(0, 0, 1, 40.0 + i, False) for i in range(20)] + [Value(0, 0, 0, 3000.0, True)]
    (level,) = found(tallied(values))
    assert (level.role, level.count, level.mean) == (0, 1, 3000.0)
    assert 59 < level.gate < 3000
    assert level.margin == pytest.approx(3000 / 59)


def test_a_channel_that_holds_nothing_but_massive_values():
    values = [Value(0, 0, 0, x, x > 2000) for x in (1900.0, 2010.0, 2100.0)]
    (level,) = found(tallied(values))
    assert level.count == 3
    assert level.gate < 1900
    assert level.margin == math.inf


def test_other_values_above_the_smallest_massive_one_leave_a_margin_below_one():
    """A sequence with a small median has a small threshold; in others the same channel is ordinary
    and larger.
    """
    (level,) = found(tallied([Value(0, 0, 0, 150.0, True)], {(0, 0): 300.0}))
    assert level.count == 1
    assert level.mean == 150.0
    assert level.gate < 150.0
    assert torch.tensor(150.0) > torch.tensor(level.gate)
    assert level.margin == pytest.approx(0.5)
