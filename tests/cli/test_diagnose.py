"""`biassurgery diagnose`: what the library finds, in both forms, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

import biassurgery as bs
from tests.cli.running import common, run, run_json
from tests.cli.test_text import windows
from tests.models import CHANNEL, LAYER, planted


def test_the_document_is_what_the_library_finds(llama: Path, tmp_path: Path) -> None:
    rows = windows((llama / "text.txt").read_text())
    expected = bs.diagnose(planted("llama"), list(rows.split(8)))
    file = tmp_path / "found.safetensors"
    found = run_json("diagnose", *common(llama), "--ratio", 3, "--save", file)
    assert found["ignore"] == expected.ignore(3.0)
    assert f"model.layers.{LAYER}.mlp.down_proj" in found["ignore"]
    assert found["verdict"] == list(expected.verdict)
    for row, other in zip(found["linears"], expected.linears):
        assert row["name"] == other.name
        assert row["largest"] == pytest.approx(other.largest, rel=1e-5)
        assert row["ratio"] == pytest.approx(other.ratio, rel=1e-5)
    assert (found["super_weights"][0]["row"], found["float16"]["overflows"]) == (CHANNEL, None)
    assert found["carriers"] == dict(expected.carriers)
    assert (found["tokens"], found["not_told"]) == (expected.tokens, [])
    assert [site["count"] for site in found["sites"]] == [site.count for site in expected.sites]
    assert found["saved"] == str(file)
    saved = bs.Diagnosis.load(file)
    assert saved.ignore(3.0) == found["ignore"]
    assert saved.sites.origin.source.startswith(str(llama / "text.txt"))


def test_people_get_the_verdict_first_and_the_list_last(llama: Path) -> None:
    text = run("diagnose", *common(llama), "--ratio", 3).stdout
    lines = text.splitlines()
    about = lines.index("")
    assert lines[about + 1].startswith("massive activations: up to ")
    assert lines[-1] == f"model.layers.{LAYER}.mlp.down_proj"
    assert "linear layers at ratio 3 or more:" in lines


def test_a_ratio_below_one_is_wrong_usage(llama: Path) -> None:
    run("diagnose", *common(llama), "--ratio", 0.5, code=2)
