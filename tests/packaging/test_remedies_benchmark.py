"""The benchmark of remedies: what its verdicts say, that rows run, and that pin does something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import biassurgery as bs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import activations
import remedies
from timing import Difference, difference


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A LLaMA of the benchmark's depth, but 48 times as narrow."""
    config = transformers.LlamaConfig

    def tiny(**options: Any) -> Any:
        small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        return config(**options | small)

    monkeypatch.setattr(transformers, "LlamaConfig", tiny)
    levels = {7: {"start": 3000.0, "elsewhere": 9000.0}}
    monkeypatch.setattr(activations, "LEVELS", levels)
    return activations.build("llama", "cpu", torch.float32)


def test_a_verdict_is_of_the_whole_interval() -> None:
    assert Difference(0.0, -0.02, 0.009).verdict(0.01) == "passed"
    assert Difference(0.02, 0.011, 0.03).verdict(0.01) == "failed"
    assert Difference(0.0, -0.02, 0.02).verdict(0.01) == "inconclusive"
    assert Difference(0.02, 0.009, 0.03).verdict(0.01) == "inconclusive"


def test_a_difference_is_taken_repeat_by_repeat() -> None:
    base = [1.0, 2.0, 4.0, 8.0, 16.0]  # a machine that slows down
    other = [1.1 * seconds for seconds in base]
    found = difference({"a": other, "b": base, "base": base}, "a", "b", "base")
    assert found == pytest.approx((0.1, 0.1, 0.1))
    noisy = [1.3, 2.0, 5.2, 8.0, 16.0]
    found = difference({"a": noisy, "b": base, "base": base}, "a", "b", "base")
    assert (found.low, found.high) == pytest.approx((0.0, 0.3))
    assert found.median == 0


def test_rows_are_measured(model: Any) -> None:
    with torch.no_grad():
        rows = remedies.pinned(model, 16, 2)
        passes = remedies.diagnosing(model, 16, 2)
        few, many = (remedies.alone(model, layers, 5) for layers in ("first", "all"))
    assert list(rows) == ["pin", "pin, all layers", "unpatched again"]
    assert all(list(ways) == ["prefill", "decode"] for ways in rows.values())
    assert passes.median > 0
    assert 0 < few["microseconds"] < many["microseconds"]
    assert not bs.patches(model)


def test_pin_writes_and_rescale_leaves_no_code(model: Any) -> None:
    ids = activations.tokens(model, 1, 16)
    assert remedies.rescaled(model)
    before = remedies.code_of(model)
    for name in ("pin", "pin, all layers"):
        with remedies.variants(model)[name]() as pinned:
            after = remedies.code_of(pinned)
            assert any(after[module] != code for module, code in before.items())
            with bs.record(pinned, "block_output") as seen, torch.no_grad():
                pinned(ids)
        written = seen["block_output"][activations.LAYER][0, 0, 7]
        assert written == 3000
        last = seen["block_output"][activations.LAST][0, 0, 7]
        assert (last == 3000) == (name == "pin, all layers")
