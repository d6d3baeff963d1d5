"""The tally against the raw list of values that it stands for."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
from dataclasses import dataclass

import pytest
import torch

from biassurgery.findings.tally import CLUSTER_RATIO, Level, Tally, levels

LAYERS = 3
WIDTH = 5
ROLES = 2


@dataclass(frozen=True)
class Value:
    """One large value that a measurement set aside."""

    layer: int
    channel: int
    role: int
    value: float
    hit: bool


def number(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tallied(
    values: list[Value],
    below: dict[tuple[int, int], float] | None = None,
    sequences: int = 0,
    tokens: int = 0,
) -> Tally:
    tally = Tally.empty(LAYERS, WIDTH)
    if values:
        keys = [
            tally.key(
                v.layer, torch.tensor([v.channel]), torch.tensor([v.role]), ROLES, number(v.value)
            )
            for v in values
        ]
        tally = tally.with_values(
            torch.cat(keys),
            number(*(v.value for v in values)),
            torch.tensor([v.hit for v in values]),
        )
    lower = torch.zeros(LAYERS, WIDTH)
    for place, magnitude in (below or {}).items():
        lower[place] = magnitude
    return tally.with_totals(
        lower, torch.full((LAYERS,), float(sequences)).double(), sequences, tokens
    )


def found(tally: Tally) -> list[Level]:
    return list(levels(tally, ROLES))


def wanted(
    values: list[Value], below: dict[tuple[int, int], float]
) -> list[tuple[tuple[int, ...], list[float], float, float]]:
    """((layer, channel, role, cluster), its values, ends of the gap), from sorted lists of the
    values themselves.
    """
    result = []
    for layer, channel in itertools.product(range(LAYERS), range(WIDTH)):
        here = [v for v in values if (v.layer, v.channel) == (layer, channel)]
        hits = [abs(v.value) for v in here if v.hit]
        if not hits:
            continue
        line = [
            below[layer, channel],
            *sorted(abs(v.value) for v in here if abs(v.value) <= min(hits)),
        ]
        low, high = max(itertools.pairwise(line), key=lambda gap: gap[1] / gap[0])
        for role in range(ROLES):
            massive = sorted(v.value for v in here if v.role == role and abs(v.value) >= high)
            result += [
                ((layer, channel, role, i), cluster, low, high)
                for i, cluster in enumerate(clustered(massive))
            ]
    return result


def clustered(values: list[float]) -> list[list[float]]:
    """Ascending values, parted where the sign changes or a gap is at least `CLUSTER_RATIO` and
    wider than what it parts.
    """
    clusters: list[list[float]] = []
    for x in values:
        clusters.append([x])
        while len(clusters) > 1 and not apart(*clusters[-2:]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return clusters


def apart(a: list[float], b: list[float]) -> bool:
    near, far = sorted((sorted(map(abs, a)), sorted(map(abs, b))))
    gap = far[0] / near[-1]
    return a[0] * b[0] < 0 or (
        gap >= CLUSTER_RATIO and gap > near[-1] / near[0] and gap > far[-1] / far[0]
    )


def random_values(seed: int) -> tuple[list[Value], dict[tuple[int, int], float]]:
    """Channels with ordinary values of 20 to 60, some with massive ones of 800 to 9000 of which
    those beyond 1000 meet the definition.
    """
    draw = random.Random(seed)
    values = []
    below = {}
    for layer, channel in itertools.product(range(LAYERS), range(WIDTH)):
        below[layer, channel] = float(torch.tensor(draw.uniform(5, 20)))
        numbers = [draw.choice((-1, 1)) * draw.uniform(20, 60) for _ in range(draw.randrange(20))]
        if draw.random() < 0.7:
            for _ in range(draw.randrange(1, 4)):
                centre = draw.choice((-1, 1)) * draw.choice((1300, 3000, 9000))
                numbers += [centre * draw.uniform(0.85, 1.15) for _ in range(draw.randrange(1, 12))]
        for number in numbers:
            magnitude = abs(number)
            values.append(Value(layer, channel, draw.randrange(ROLES), number, magnitude > 1200))
    draw.shuffle(values)
    return values, below


@pytest.mark.parametrize("seed", range(20))
def test_levels_are_those_of_the_values_themselves(seed):
    values, below = random_values(seed)
    expected = wanted(values, below)
    actual = found(tallied(values, below))
    assert expected
    assert [(s.layer, s.channel, s.role, s.cluster) for s in actual] == [
        place for place, *_ in expected
    ]
    for level, (_, cluster, low, high) in zip(actual, expected, strict=True):
        mean = math.fsum(cluster) / len(cluster)
        assert level.count == len(cluster)
        assert level.mean == pytest.approx(mean, rel=1e-12)
        assert level.std == pytest.approx(
            math.sqrt(math.fsum((x - mean) ** 2 for x in cluster) / len(cluster)),
            rel=1e-9,
            abs=1e-9,
        )
        assert low < level.gate < high
        assert level.margin == pytest.approx(high / low, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_sum_of_parts_is_one_pass_in_any_order_and_grouping(seed):
    values, below = random_values(seed)
    whole = tallied(values, below, sequences=7, tokens=70)
    draw = random.Random(seed)
    owner = [draw.randrange(7) for _ in values]
    parts = []
    for part in range(7):
        share = (
            below
            if part == 3
            else {place: magnitude * draw.random() for place, magnitude in below.items()}
        )
        parts.append(
            tallied(
                [v for v, o in zip(values, owner, strict=True) if o == part],
                share,
                sequences=1,
                tokens=10,
            )
        )
    sums = [functools.reduce(operator.add, parts), functools.reduce(lambda a, b: b + a, parts)]
    draw.shuffle(parts)
    while len(parts) > 1:
        at = draw.randrange(len(parts) - 1)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    for merged in (*sums, parts[0]):
        assert (merged.sequences, merged.tokens) == (7, 70)
        assert torch.equal(merged.medians, whole.medians)
        for name in ("keys", "count", "low", "high", "hit", "below"):
            assert torch.equal(getattr(merged, name), getattr(whole, name)), name
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.deviation, whole.deviation, rtol=1e-9, atol=1e-9)
        for a, b in zip(found(merged), found(whole), strict=True):
            assert (a.layer, a.channel, a.role, a.cluster, a.count, a.gate, a.margin) == (
                b.layer,
                b.channel,
                b.role,
                b.cluster,
                b.count,
                b.gate,
                b.margin,
            )
            assert a.mean == pytest.approx(b.mean, rel=1e-12)
            assert a.std == pytest.approx(b.std, rel=1e-9, abs=1e-9)


def test_an_empty_tally_adds_nothing():
    values, below = random_values(0)
    tally = tallied(values, below)
    empty = Tally.empty(LAYERS, WIDTH)
    assert found(empty) == []
    for same in (tally + empty, empty + tally):
        assert all(
            torch.equal(getattr(same, name), getattr(tally, name))
            for name in (*Tally.ROWS, "below", "medians")
        )


def test_memory_stays_the_same_when_the_data_repeat():
    values, below = random_values(1)
    once = tallied(values, below)
    many = functools.reduce(operator.add, [once] * 50)
    assert torch.equal(many.keys, once.keys)
    assert torch.equal(many.count, 50 * once.count)
    again = [
        Value(v.layer, v.channel, v.role, v.value * (1 + 1e-6 * i), v.hit)
        for i in range(50)
        for v in values
    ]
    assert len(tallied(again, below).keys) <= 2 * len(once.keys)


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


def test_keys_tell_every_place_apart():
    tally = Tally.empty(LAYERS, WIDTH)
    seen = set()
    for layer, channel, role, value in itertools.product(
        range(LAYERS), range(WIDTH), range(ROLES), (150.0, -150.0, 1e-30, 3e38, 4e4)
    ):
        key = tally.key(layer, torch.tensor([channel]), torch.tensor([role]), ROLES, number(value))
        seen.add(key.item())
    assert len(seen) == LAYERS * WIDTH * ROLES * 5
