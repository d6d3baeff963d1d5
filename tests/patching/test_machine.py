"""Random operations, a few hundred always alike; 10,000: `python -m tests.patching.machine`."""

from __future__ import annotations

import pytest

from tests.patching import machine


@pytest.mark.filterwarnings("ignore")  # random patches have all sorts of reasons to warn
def test_whatever_is_done_nothing_is_left() -> None:
    begun = machine.done.total()
    machine.run(250, first_seed=4, compiled=False)
    assert machine.done.total() - begun >= 250
    for name in ("patch", "unpatch", "patched", "wrong arguments", "record", "measure"):
        assert machine.done[name] > 0, name
    assert machine.faults.total() > 0
    assert machine.effects[True] > machine.effects[False]
