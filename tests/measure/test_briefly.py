"""A default calibration reads no more than it takes to know the means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from biassurgery.adapters.registry import find_host
from biassurgery.measure import briefly
from biassurgery.measure.briefly import Seconds, calibrate_briefly
from tests.models import START_ID, planted, tokens


def read(monkeypatch: pytest.MonkeyPatch, least: int, batches: list[torch.Tensor], model: Any):
    """The sites, and how many of the batches were read."""
    monkeypatch.setattr(briefly, "LEAST", least)
    taken = []

    def every() -> Iterator[torch.Tensor]:
        for batch in batches:
            taken.append(batch)
            yield batch

    return calibrate_briefly(find_host(model), every(), None), len(taken)


def test_constants_are_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their deviation is 0: the second batch adds no site."""
    model = planted("llama")
    batches = [tokens(4, seed=seed, delimiter_at=None) for seed in range(9)]
    sites, count = read(monkeypatch, 100, batches, model)
    assert count == 2
    assert sites.tally.sequences == 8
    assert all(site.std / site.count**0.5 <= 0.01 * site.mean for site in sites)
    sites, count = read(monkeypatch, 5 * 96, batches, model)
    assert (count, sites.tally.tokens) == (5, 5 * 96)


def test_what_varies_is_read_until_its_mean_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of 1 and 1.2 times one: a deviation of 9 %, of 81 values 1 % of the mean."""
    model = planted("llama")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[2] = 1.2 * table[START_ID]
    batches = [tokens(8, 12, seed=seed) for seed in range(20)]
    for batch in batches:
        batch[batch == 2] = 3
        batch[::2, 0] = 2
    sites, count = read(monkeypatch, 100, batches, model)
    (start,) = [site for site in sites.at(sites.layers()[0]) if site.role == "start"]
    assert 0.05 < start.std / start.mean < 0.15
    needed = (start.std / start.mean / 0.01) ** 2
    assert needed <= start.count < needed + 9
    assert 2 < count < 20


def test_a_new_site_and_a_rare_one_are_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delimiter comes late, and its first values do not say how it varies."""
    model = planted("llama")
    rare = tokens(1, delimiter_at=9)
    batches = [*(tokens(4, seed=seed, delimiter_at=None) for seed in range(2)), *[rare] * 9]
    sites, count = read(monkeypatch, 4 * 24 * 2 + 1, batches, model)
    assert count == 2 + 4
    assert {site.role: site.count for site in sites}["elsewhere"] == 4


def test_without_any_site_all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [tokens(4, seed=seed, delimiter_at=None)[:, 1:] for seed in range(5)]
    sites, count = read(monkeypatch, 10, batches, planted("llama"))
    assert (len(sites), count) == (0, 5)


def test_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [tokens(4, seed=seed) for seed in range(9)]
    first, count = read(monkeypatch, 300, batches, planted("llama"))
    again, same = read(monkeypatch, 300, batches, planted("llama"))
    assert (again, same) == (first, count)


def test_seconds_in_words() -> None:
    assert str(Seconds(0.2, 0.9)) == "a second"
    assert str(Seconds(3.2, 3.9)) == "4 s"
    assert str(Seconds(11.2, 60.9)) == "12 to 61 s"
