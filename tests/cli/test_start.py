"""`--start`, and how much of a text is read by default."""

from __future__ import annotations

from pathlib import Path

import pytest

import biassurgery as bs
from tests.checkpoints import checkpoint, tokenizer
from tests.cli.running import CPU, LENGTH, common, run, run_json
from tests.cli.test_text import windows
from tests.models import planted

START = ("--start", "<s>", "--bos", "no")


def test_calibrate_and_detect_behind_a_start_token(llama: Path) -> None:
    rows = list(windows((llama / "text.txt").read_text(), bos=False).split(8))
    found = run_json("calibrate", *common(llama), *START)
    wanted = bs.calibrate(planted("llama"), rows, start=0)
    assert found["data"]["start"] == "<s> (0) in front of every window"
    assert found["data"]["BOS"] == "none"
    assert (found["origin"]["start"], found["origin"]["starts"]) == (0, [0])
    for row, site in zip(found["sites"], wanted, strict=True):
        assert row["mean"] == pytest.approx(site.mean, rel=1e-6)
    assert found["sequences"] == sum(map(len, rows))
    assert found["tokens"] == found["sequences"] * (LENGTH + 1)
    detected = run_json("detect", *common(llama), *START)
    assert detected["sites"] == found["sites"]


def test_diagnose_puts_one_start_token_in_front(llama: Path, tmp_path: Path) -> None:
    rows = list(windows((llama / "text.txt").read_text(), bos=False).split(8))
    expected = bs.diagnose(planted("llama"), rows, start=0)
    file = tmp_path / "found.safetensors"
    result = run("diagnose", *common(llama), *START, "--save", file)
    assert "two start tokens" not in result.stderr
    found = bs.Diagnosis.load(file)
    assert found.tokens == expected.tokens == sum(row.numel() + len(row) for row in rows)
    assert found.carriers == expected.carriers


def test_eval_scores_the_same_tokens(llama: Path) -> None:
    text = (llama / "text.txt").read_text()
    ids = windows(text, bos=False).flatten()
    model = planted("llama")
    result = run_json("eval", *common(llama), "--start", "0", "--bos", "no", "--mode", "set_mean")
    original, set_mean = result["results"]
    wanted = bs.perplexity(model, ids, length=LENGTH, start=0)
    assert original["perplexity"] == pytest.approx(wanted, rel=1e-6)
    assert set_mean["perplexity"] == pytest.approx(wanted, rel=1e-2)
    assert "behind token 0" in result["sites"]["origin"]["source"]
    without = run_json("eval", *common(llama), "--bos", "no", "--mode", "set_zero")
    assert without["results"][0]["perplexity"] == pytest.approx(
        bs.perplexity(model, ids, length=LENGTH), rel=1e-6
    )


def test_a_start_token_that_cannot_be(llama: Path) -> None:
    for options, said in (
        (("--start", "<s>"), "<s> (0) stands in front of every window already; say --bos no"),
        (("--start", "<no>", "--bos", "no"), "'<no>' is no token of this tokenizer"),
        (("--start", "9999", "--bos", "no"), "start: 9999 is token 9999, and the model has 96"),
    ):
        result = run("detect", *common(llama), *options, code=1)
        assert said in result.stderr
        assert result.stdout == ""


def test_detect_reads_so_many_tokens_and_says_so(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_json("detect", *common(llama))
    assert "left out" not in whole["data"]
    monkeypatch.setattr("biassurgery.cli.detect.MOST", 10 * LENGTH + 5)
    found = run_json("detect", *common(llama))
    assert found["data"]["windows"] == found["sequences"] == 10
    left = whole["data"]["windows"] - 10
    said = f"{left} windows behind the first {10 * LENGTH + 5} tokens (--max-windows sets another"
    assert found["data"]["left out"].startswith(said)
    assert f"left out {left} windows" in run("detect", *common(llama)).stdout
    more = run_json("detect", *common(llama), "--max-windows", 12)
    assert more["sequences"] == 12
    assert "left out" not in more["data"]
    assert run_json("calibrate", *common(llama))["sequences"] == whole["data"]["windows"]


def test_a_tokenizer_without_bos_needs_no_more_than_start(tmp_path: Path) -> None:
    checkpoint(tmp_path, bos=False)
    text = tmp_path / "text.txt"
    text.write_text("the massive values of a model, and what they are worth. " * 9)
    found = run_json(
        "calibrate", tmp_path, "--text", text, "--length", LENGTH, *CPU, "--start", "<s>"
    )
    ids = tokenizer(bos=False)(text.read_text())["input_ids"]
    assert found["sequences"] == len(ids) // LENGTH
    assert {site["role"] for site in found["sites"]} == {"start", "elsewhere"}
