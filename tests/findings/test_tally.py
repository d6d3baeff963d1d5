"""The tally against the raw list of values that it stands for."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random

import pytest
import torch

from biassurgery.findings.levels import CLUSTER_RATIO
from biassurgery.findings.tally import Tally
from tests.findings.tallied import LAYERS, ROLES, WIDTH, Value, float64, found, tallied


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


def test_keys_tell_every_place_apart():
    tally = Tally.empty(LAYERS, WIDTH)
    seen = set()
    for layer, channel, role, value in itertools.product(
        range(LAYERS), range(WIDTH), range(ROLES), (150.0, -150.0, 1e-30, 3e38, 4e4)
    ):
        key = tally.key(layer, torch.tensor([channel]), torch.tensor([role]), ROLES, float64(value))
        seen.add(key.item())
    assert len(seen) == LAYERS * WIDTH * ROLES * 5
