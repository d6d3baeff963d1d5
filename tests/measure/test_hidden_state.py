"""Tables of a hidden state, against sorting in plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch

from biassurgery.errors import BadBatch
from biassurgery.measure.hidden_state import carrier_table, magnitude_table, variation_table

ROWS, TOKENS, WIDTH = 6, 20, 30


@pytest.fixture
def hidden() -> torch.Tensor:
    """Ordinary values, and one place where each sequence has nearly the same large one."""
    values = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    values[:, 0, 7] = -5000.0 + torch.arange(ROWS)
    values[:, 3, 7] = 40.0
    return values


def test_magnitudes_are_those_of_a_sorted_list(hidden: torch.Tensor) -> None:
    table = magnitude_table(hidden, 2)
    rows = [sorted(map(abs, row.flatten().tolist()), reverse=True) for row in hidden]
    total = TOKENS * WIDTH
    wanted = {"top 1": 0, "top 2": 1, "top 5": 4, "top 10": 9, "top 100": 99}
    wanted |= {"top 1 %": total // 100 - 1, "top 10 %": total // 10 - 1, "median": total // 2 - 1}
    for rank, at in wanted.items():
        assert table[rank] == pytest.approx(statistics.fmean(row[at] for row in rows)), rank
    assert table["top 1"] == pytest.approx(5000.0 - 2.5)
    assert table.layer == 2
    assert "4,998" in str(table)


def test_few_values_have_fewer_ranks() -> None:
    table = magnitude_table(torch.arange(12.0).view(1, 3, 4), 0)
    assert [row.rank for row in table.rows] == [
        *(f"top {rank}" for rank in range(1, 6)),
        "top 10",
        "top 1 %",
        "top 10 %",
        "median",
    ]
    assert (table["top 1"], table["median"]) == (11.0, 6.0)


def test_variation_is_over_sequences_at_one_place(hidden: torch.Tensor) -> None:
    table = variation_table(hidden, 2)
    first, second = table["top 1"], table["top 2"]
    assert (first.token, first.channel, second.token, second.channel) == (0, 7, 3, 7)
    assert first.mean == pytest.approx(-4997.5)
    assert first.variance == pytest.approx(statistics.pvariance(range(ROWS)))
    assert second.variance == 0
    means = hidden.abs().mean(0)
    above = int((means > means[table["median"].token, table["median"].channel]).sum())
    assert above == TOKENS * WIDTH // 2 - 1
    median = table["median"]
    values = hidden[:, median.token, median.channel].tolist()
    assert median.mean == pytest.approx(statistics.fmean(values))
    assert median.variance == pytest.approx(statistics.pvariance(values))


def test_carriers_are_counted_by_channel_and_token(hidden: torch.Tensor) -> None:
    ids = torch.arange(TOKENS).repeat(ROWS, 1)
    ids[:2, 0] = 77
    hidden[1, 5, 3] = 9000.0
    table = carrier_table(hidden, ids, 2, lambda token: f"<{token}>")
    assert [(row.channel, row.text, row.positions, row.count) for row in table.rows] == [
        (7, "<0>", (0, 0), 4),
        (7, "<77>", (0, 0), 2),
        (3, "<5>", (5, 5), 1),
    ]
    assert table.rows[0].mean == pytest.approx(-4996.5)
    strict = carrier_table(hidden, ids, 2, str, min_magnitude=6000)
    assert [row.channel for row in strict.rows] == [3]
    many = carrier_table(hidden, ids, 2, str, min_magnitude=0, min_ratio=1)
    assert f"and {len(many.rows) - 40} more" in str(many)


def test_what_is_no_hidden_state(hidden: torch.Tensor) -> None:
    with pytest.raises(BadBatch, match=r"give hidden states \(N, T, D\)"):
        magnitude_table(hidden[0], 0)
    with pytest.raises(BadBatch, match="one sequence"):
        variation_table(hidden[:1], 0)
    with pytest.raises(BadBatch, match=r"ids: shape \(6, 19\)"):
        carrier_table(hidden, torch.zeros(ROWS, TOKENS - 1, dtype=torch.int64), 0, str)
    hidden[0, 0, 0] = torch.inf
    with pytest.raises(BadBatch, match="NaN or infinity"):
        magnitude_table(hidden, 0)
