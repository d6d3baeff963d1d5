"""`benchmarks/peers.py` on a planted model: what needs no other library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
import peers_ways


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    small = {"BLOCK": models.LAYER, "CHANNEL": models.CHANNEL, "VALUE": 3000.0, "GATE": 700.0}
    for name, value in {**small, "NEW": 4, "PROMPT": 10}.items():
        monkeypatch.setattr(peers_ways, name, value)
    ids = models.tokens(rows=1, length=20)[0]
    return ids.masked_fill(ids == models.DELIMITER_ID, 2)  # the value at the start token alone


@torch.no_grad()
def found(name: str, text: torch.Tensor) -> dict[str, str | None]:
    return peers_ways.off(peers_ways.WAYS[name](models.planted("llama"), None), text)


def test_this_library_is_right_where_a_hook_is_not(text: torch.Tensor) -> None:
    assert found("biassurgery", text) == dict.fromkeys(
        ("alone", "left padding", "decode", "padded median")
    )
    by_hand = found("by hand", text)
    assert by_hand["alone"] is None
    assert by_hand["left padding"] is not None


def result(ratio: float, **off: str) -> dict[str, Any]:
    cell = {"ratio": ratio, "again": 1.01, "seconds": 1.0}
    names = ("alone", "left padding", "decode", "padded median")
    return {
        "off": {**dict.fromkeys(names), **off},
        **dict.fromkeys(("prefill", "decode", "measure"), cell),
        "memory": 5e6,
    }


def test_a_budget_that_is_exceeded_fails() -> None:
    assert peers.over_budget(result(1.0)) == []
    over = peers.over_budget(result(1.2))
    assert [line.split(":")[0] for line in over] == ["prefill", "decode"]
    assert peers.over_budget(result(1.0, alone="3.0")) == ["alone is not right"]
    assert peers.over_budget({"failed": "no"}) == ["no"]


def test_the_table_says_what_is_off_and_what_failed() -> None:
    lines = peers.table({"a": result(1.5, alone="3.0"), "b": {"failed": "not there"}}).splitlines()
    assert lines[2].startswith("| a | 1.50x | 1.50x | 1.50x | 5 MB | **off: 3.0** | yes |")
    assert lines[3].startswith("| b | not there |")
    assert len({line.count("|") for line in lines}) == 1
