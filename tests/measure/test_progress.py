"""How far a pass has come, where stderr is no terminal: a line every ten seconds."""

from __future__ import annotations

import sys

import pytest

import biassurgery as bs
from biassurgery.measure import progress
from biassurgery.measure.reading import with_bar
from tests.models import planted, tokens


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have gone by, which stand until they are changed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in with_bar(range(8), "reading", None):
        clock[0] += 4
    assert capsys.readouterr().err.splitlines() == [
        "reading: 3 of 8 batches in 12 s, about 20 s to go",
        "reading: 6 of 8 batches in 24 s, about 8 s to go",
    ]
    for _ in with_bar(iter(range(8)), "reading", None):  # nobody knows how many
        clock[0] += 9
    assert capsys.readouterr().err.splitlines()[0] == "reading: 2 batches in 18 s"


def test_none_where_it_is_short_or_not_wanted(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in with_bar(range(8), "reading", None):
        clock[0] += 1
    for _ in with_bar(range(8), "reading", False):
        clock[0] += 60
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", [bs.calibrate, bs.detect, bs.perplexity, bs.calibrate_key_values])
def test_verbs_know_how_many_batches_there_are(
    verb: object, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    model = planted("llama")
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 6))
    model.model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 6))
    verb(model, [tokens(2)] * 4)  # type: ignore[operator]
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(" of 4 batches in " in line for line in lines)


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(with_bar(range(3), "reading", None)) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
