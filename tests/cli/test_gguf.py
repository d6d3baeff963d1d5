"""GGUF on the command line: like any checkpoint, and refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CPU, run, run_json
from tests.gguf_files import write_gguf
from tests.models import CHANNEL, LAYER

pytest.importorskip("gguf", reason="needs gguf (the gguf extra)")


def test_a_gguf_file_and_the_folder_made_of_it_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    options = ("--length", 32, *CPU)
    found = run_json("detect", file, *options)
    assert {(site["layer"], site["channel"]) for site in found["sites"]} >= {(LAYER, CHANNEL)}
    assert found["data"]["BOS"].startswith("<s> (0) in front")
    told = run_json("convert", tmp_path, tmp_path / "plain")
    assert told["tokenizer"] is True
    assert told["dtype"] == "float32"
    plain = run_json("detect", tmp_path / "plain", *options)
    assert [layer["top"] for layer in plain["layers"]] == [
        pytest.approx(layer["top"], rel=1e-6) for layer in found["layers"]
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("architecture", "of architecture 'nonsense'"),
        ("truncated", "cannot be read as GGUF"),
        ("no tokenizer", "has no tokenizer among its files"),
        ("encoding", "latin.txt cannot be read ('utf-8' codec"),
        ("empty", "is an empty folder"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_1(tmp_path: Path, kind: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "model.gguf"
    architecture = "nonsense" if kind == "architecture" else "llama"
    write_gguf(file, architecture=architecture, tokenizer=kind != "no tokenizer")
    text = tmp_path / "latin.txt"
    text.write_bytes("Schöne Grüße, und noch viel mehr davon. ".encode("latin-1") * 20)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:20_000])
    if kind == "empty":
        file.unlink()
    options = ("--text", text) if kind == "encoding" else ()
    result = run("detect", folder, *options, *CPU, "--json", code=1)
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr


def test_convert_refuses_what_is_there(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    result = run("convert", tmp_path / "model.gguf", tmp_path, code=1)
    assert "is there already" in result.stderr.splitlines()[-1]
