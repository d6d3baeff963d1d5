"""`--onload blocks` of the commands that measure."""

from __future__ import annotations

from pathlib import Path

import pytest

import biassurgery as bs
from tests.cli.running import common, run, run_json
from tests.measure.killing import bits

BLOCKS = ("--onload", "blocks")


@pytest.mark.parametrize("command", ["calibrate", "detect", "diagnose"])
def test_the_same_document(llama: Path, tmp_path: Path, command: str) -> None:
    arguments = (command, *common(llama), "--batch-size", 2, "--max-windows", 6)
    whole = run_json(*arguments)
    assert run_json(*arguments, *BLOCKS) == whole
    assert run_json(*arguments, *BLOCKS, "--spill", tmp_path / "states") == whole
    assert not [path for path in (tmp_path / "states").iterdir() if "blocks" in path.name]


def test_findings_and_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", *common(llama), "--max-windows", 4)
    run(*arguments, "--sites", tmp_path / "sites", "--key-values", tmp_path / "kv")
    kept = ("--checkpoint", tmp_path / "pass", "--spill", tmp_path / "states")
    files = ("--sites", tmp_path / "sites2", "--key-values", tmp_path / "kv2")
    run(*arguments, *BLOCKS, *kept, *files)
    for name, kind in (("sites", bs.Sites), ("kv", bs.KeyValues)):
        found = kind.load(tmp_path / name)
        assert bits(kind.load(tmp_path / f"{name}2")) == bits(found)
    result = run(*arguments, *BLOCKS, "--checkpoint", tmp_path / "other", code=1)
    assert "error: checkpoint: " in result.output
    assert "give spill=" in result.output


def test_what_is_read_as_a_whole(llama: Path, tmp_path: Path) -> None:
    result = run("calibrate", "test_vit", *BLOCKS, code=1)
    assert "error: onload: test_vit is a model of timm" in result.output
    result = run("calibrate", *common(llama), "--spill", tmp_path, code=1)
    assert "error: spill: " in result.output
