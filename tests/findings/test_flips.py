"""No damage of a file is silent: `tests/findings/flips.py` says of what, this takes a sample."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.findings.flips import EXACT, REFUSED, formats, trial

EVERY = 67  # a prime, so that all eight bits of a byte have their turn


@pytest.mark.parametrize("name", formats())
def test_a_damaged_file_is_refused_or_loads_exactly(name: str) -> None:
    results = trial(formats()[name], every=EVERY)
    total = sum(results.values(), Counter())
    assert set(total) <= {REFUSED, EXACT}, results
    assert total[REFUSED] >= 40
    assert results["header flipped"][REFUSED] > 5
    if "data flipped" in results:
        assert set(results["data flipped"]) == {REFUSED}


def test_an_undamaged_file_is_exact(tmp_path) -> None:
    for number, kind in enumerate(formats().values()):
        (tmp_path / str(number)).mkdir()
        path = kind.write(tmp_path / str(number))
        assert kind.load(path) == kind.load(path)
