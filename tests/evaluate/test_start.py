"""`start=` of evaluations: the same tokens are scored with and without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption
from tests.evaluate.loops import Letters, loop, stream
from tests.models import PAD_ID, START_ID, planted, tokens

S = START_ID


def words(rows: int = 3, length: int = 16, seed: int = 4) -> torch.Tensor:
    return tokens(rows, length + 1, seed)[:, 1:]


def losses(model: Any, row: list[int], front: list[int]) -> list[float]:
    """The negative log-likelihoods of all but the first word of a row, behind some tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([front + row]), use_cache=False).logits[0].double()
    scores = logits.log_softmax(-1)[len(front) : -1]
    return [-scores[at, token].item() for at, token in enumerate(row[1:])]


def by_hand(model: Any, rows: list[list[int]], front: list[int]) -> float:
    every = [loss for row in rows for loss in losses(model, row, front)]
    return math.exp(sum(every) / len(every))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi"])
def test_against_logits_by_hand(family: str) -> None:
    model = planted(family)
    ids = words()
    without = bs.perplexity(model, ids)
    assert without == pytest.approx(by_hand(model, ids.tolist(), []), rel=1e-6)
    assert without == pytest.approx(loop(model, ids.tolist()), rel=1e-6)
    behind = bs.perplexity(model, ids, start=S)
    assert behind == pytest.approx(by_hand(model, ids.tolist(), [S]), rel=1e-6)
    assert behind != pytest.approx(without, rel=1e-4)


def test_padding_on_either_side() -> None:
    model = planted("llama")
    rows = [row[: 16 - 3 * at].tolist() for at, row in enumerate(words())]
    expected = by_hand(model, rows, [S])
    for side in ("left", "right"):
        pads = [[PAD_ID] * (16 - len(row)) for row in rows]
        ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)]
        real = [[token != PAD_ID for token in row] for row in ids]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real).long()}
        assert bs.perplexity(model, batch, start=S) == pytest.approx(expected, rel=1e-5)


def test_labels_score_what_they_score_without_it() -> None:
    model = planted("llama")
    ids = words(2)
    labels = ids.clone()
    labels[:, :7] = -100
    every = [loss for row in ids.tolist() for loss in losses(model, row, [S])[6:]]
    found = bs.perplexity(model, {"input_ids": ids, "labels": labels}, start=S)
    assert found == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-6)


def test_windows_of_a_text_are_the_same() -> None:
    """`length` tokens of the stream each, and the start token in front of them."""
    model = planted("llama")
    ids = stream(47)
    rows = ids[:40].view(4, 10).tolist()
    assert bs.perplexity(model, ids, length=10, start=S) == pytest.approx(
        by_hand(model, rows, [S]), rel=1e-6
    )
    assert bs.perplexity(model, ids, length=10) == pytest.approx(by_hand(model, rows, []), rel=1e-6)
    text = "themassiveactivations"
    letters = [ord(letter) - 95 for letter in text]
    assert bs.perplexity(model, text, tokenizer=Letters(), start=S) == pytest.approx(
        by_hand(model, [letters], [S]), rel=1e-6
    )


def test_a_window_of_all_learned_positions_has_no_room() -> None:
    ids = stream(600)
    for length in (None, 256):
        with pytest.raises(BadOption, match=r"length: 256 .*pass length=255, without start= too"):
            bs.perplexity(planted("gpt2"), ids, length=length, start=S)
    assert bs.perplexity(planted("gpt2"), ids[:255], length=255, start=S) > 1
    assert bs.perplexity(planted("llama"), ids[:256], start=S) > 1  # rotary positions go on


def test_a_second_start_token_is_refused() -> None:
    model = planted("llama")
    with pytest.raises(BadOption, match="start: 0, but also bos: 5"):
        bs.perplexity(model, stream(40), bos=5, start=S)
    key_values = bs.calibrate_key_values(model, words(), start=S)
    with (
        bs.patched(model, "transplant", key_values=key_values),
        pytest.raises(BadOption, match="the model has the patch 'transplant'"),
    ):
        bs.perplexity(model, words(), start=S)


def test_the_transplant_of_a_constant_start_is_exact() -> None:
    model = planted("llama")
    ids = words()
    key_values = bs.calibrate_key_values(model, words(seed=9), start=S)
    behind = bs.perplexity(model, ids, start=S)
    with bs.patched(model, "transplant", key_values=key_values):
        assert bs.perplexity(model, ids) == pytest.approx(behind, rel=1e-5)
    assert bs.perplexity(model, ids) != pytest.approx(behind, rel=1e-4)


def test_a_comparison_hands_it_on() -> None:
    model = planted("llama")
    ids = words()
    sites = bs.calibrate(model, words(seed=9), start=S)
    key_values = bs.calibrate_key_values(model, words(seed=9), start=S)
    handed = []

    def evaluate(model: Any, start: int | None) -> float:
        handed.append(start)
        return bs.perplexity(model, ids, start=start)

    modes = [None, "set_zero", "set_mean", bs.modes.Transplant(key_values)]
    table = bs.compare(model, evaluate, modes, sites=sites, start=S)
    assert handed == [S, S, S, None]
    assert table[None] == pytest.approx(by_hand(model, ids.tolist(), [S]), rel=1e-6)
    assert table["set_mean"] == pytest.approx(table[None], rel=1e-4)
    assert table["transplant"] == pytest.approx(table[None], rel=1e-5)
    assert abs(table["set_zero"] / table[None] - 1) > 1e-3


def test_an_evaluation_that_does_not_take_it(tmp_path: Path) -> None:
    model = planted("llama")
    with pytest.raises(BadOption, match=r"called with \(model, start\).*lambda model, start: "):
        bs.compare(model, lambda m: 0.0, start=S)
    with pytest.raises(BadOption, match=r"lambda model, checkpoint, start: .*checkpoint=checkp"):
        bs.compare(model, lambda m, start: 0.0, start=S, checkpoint=tmp_path / "kept")
