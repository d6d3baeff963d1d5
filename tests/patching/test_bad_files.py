"""Folders of patches that are refused, and those that cannot be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

import biassurgery as bs
from biassurgery.errors import FileError, Incompatible, NotPatched
from biassurgery.modes import Noise, SetZero
from tests import models
from tests.refusals import IDS, SITES, check
from tests.state import untouched


@pytest.fixture
def saved(tmp_path):
    model = models.planted("llama")
    with (
        bs.patched(model, Noise(scale=0.5), sites=SITES),
        bs.patched(model, "set_zero", sites=SITES),
    ):
        bs.save_patch(model, tmp_path / "patch")
    return tmp_path / "patch"


def loading(folder: Any, error: type[bs.SurgeryError], pattern: str, family: str = "llama") -> None:
    check(models.planted(family), lambda m: bs.load_patch(m, folder), error, pattern)


def test_a_patch_of_another_architecture(saved):
    loading(saved, Incompatible, "architecture.*'llama'.*'gpt2'", family="gpt2")


def test_a_folder_that_is_not_there_or_no_folder(saved, tmp_path):
    loading(tmp_path / "nowhere", FileError, "nowhere")
    loading(saved / "surgery.json", FileError, "surgery.json")


@pytest.mark.parametrize("keep", [0, 1, 20, -2])
@pytest.mark.parametrize("name", ["surgery.json", "surgery.safetensors"])
def test_a_truncated_patch(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    loading(saved, FileError, name)


def test_a_patch_file_of_another_kind(saved):
    content = json.loads((saved / "surgery.json").read_text())
    first = content["patches"][0]
    for wrong in (
        [],
        5,
        "x",
        content | {"format": 99},
        {"format": content["format"]},
        content | {"patches": [{}]},
        content | {"patches": [first | {"mode": "set_maen"}]},
        content | {"patches": [first | {"options": {"scale": "x"}}]},
        content | {"patches": [first | {"sites": {}}]},
        content | {"patches": 3},
    ):
        (saved / "surgery.json").write_text(json.dumps(wrong))
        with untouched(model := models.planted("llama"), IDS), pytest.raises(bs.SurgeryError):
            bs.load_patch(model, saved)
    (saved / "surgery.json").write_bytes(b"\xff\xfe\x00")
    loading(saved, FileError, "surgery.json")


def test_a_patch_that_fails_half_way_is_taken_back(saved):
    """The second of two saved patches is on the model already, so the first must not stay."""
    model = models.planted("llama")
    bs.patch_model(model, "set_zero", sites=SITES)
    check(model, lambda m: bs.load_patch(m, saved), bs.AlreadyPatched, "set_zero")
    assert [patch.mode for patch in bs.patches(model)] == [SetZero()]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with untouched(model, IDS), pytest.raises(FileError, match="file"):
            bs.save_patch(model, folder)
    assert (tmp_path / "file").read_text() == "in the way"


def test_nothing_to_save(tmp_path):
    with (
        untouched(model := models.planted("llama"), IDS),
        pytest.raises(NotPatched, match="nothing is applied"),
    ):
        bs.save_patch(model, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
