"""Samples that a `DistributedSampler` gives to two ranks."""

from __future__ import annotations

import warnings

import pytest
from torch.utils.data import DataLoader, DistributedSampler

import biassurgery as bs
from tests.models import planted, tokens


def loader(samples: int, ranks: int, **options: bool) -> DataLoader:
    rows = tokens(samples)
    sampler = DistributedSampler(rows, ranks, 0, shuffle=False, **options)  # type: ignore[arg-type]
    return DataLoader(rows, batch_size=2, sampler=sampler)  # type: ignore[arg-type]


def test_samples_that_count_twice_are_said() -> None:
    with pytest.warns(UserWarning, match="repeats 1 of its 5 samples"):
        found = bs.calibrate(planted("llama"), loader(5, 3))
    assert found.tally is not None
    assert found.tally.sequences == 2


@pytest.mark.parametrize("options", [{"samples": 6}, {"samples": 5, "drop_last": True}])
def test_none_that_count_once(options: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.perplexity(planted("llama"), loader(ranks=3, **options))
