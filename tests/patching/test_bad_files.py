"""Folders of patches that are refused, and those that cannot be written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import FileError, Incompatible, LevelOverflow, MissingPackage, NotPatched
from biassurgery.modes import Noise, SetZero
from biassurgery.saving.folder import read_folder, write_folder
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


def first_patch(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["patches"][0].update(changes)


def first_site(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["patches"][0]["sites"]["sites"][0].update(changes)


DOCUMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format true": lambda document: document.update(format=True),
    "format as text": lambda document: document.update(format="1"),
    "a newer format": lambda document: document.update(format=2),
    "no patches": lambda document: document.pop("patches"),
    "patches in an object": lambda document: document.update(patches={}),
    "a layer below zero": first_patch(layers=[-1]),
    "a layer too many": first_patch(layers=[models.LAYERS]),
    "a layer that is true": first_patch(layers=[True]),
    "a layer beyond any": first_patch(layers=[10**400]),
    "layers in an object": first_patch(layers={}),
    "a mode of no name": first_patch(mode=3),
    "a mode that is a path": first_patch(mode="../../set_mean", modules={}),
    "modules in a list": first_patch(modules=["os"]),
    "options in a list": first_patch(options=[]),
    "an option of another type": first_patch(options={"scale": [1]}),
    "an option beyond any float": first_patch(options={"scale": 10**400}),
    "an infinite option": first_patch(options={"scale": math.inf}),
    "no model": first_patch(model={}),
    "a model of true layers": first_patch(model={"architecture": "llama", "layers": True}),
    "a site below zero": first_site(channel=-1),
    "a site beyond the model": first_site(channel=models.HIDDEN),
    "a site at a layer beyond the model": first_site(layer=models.LAYERS),
    "a site that is not finite": first_site(mean=math.nan),
    "a site that is too large": first_site(gate=1e39),
    "deep": lambda document: document.update(patches=nested(200)),
}


def nested(depth: int) -> Any:
    inner: Any = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_no_version_wrote(saved, name):
    """Under a checksum that is right, as a program would write it."""
    document, tensors = read_folder(saved)
    DOCUMENTS[name](document)
    write_folder(saved, document, tensors)
    loading(saved, FileError, "folder: .*patch")


@pytest.mark.parametrize("module", ["os", "os.path", "../evil", "/tmp/evil", "evil.module"])
def test_nothing_is_imported_for_a_file(saved, module):
    document, tensors = read_folder(saved)
    first_patch(mode="unheard_of", modules={"mode": module})(document)
    write_folder(saved, document, tensors)
    before = set(sys.modules)
    loading(saved, MissingPackage, module)
    assert {name for name in set(sys.modules) - before if "evil" in name} == set()


@pytest.fixture
def bias_document(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = bs.patch_model(models.planted("llama"), "attention_bias", kind="kv", std=1.0)
    bs.save_patch(model, tmp_path)
    return tmp_path, *read_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * math.nan,
        lambda x: x / 0,
        lambda x: x.int(),
        lambda x: x[:1],
        lambda x: x[None],
    ],
)
def test_tensors_that_are_not_those_of_the_patch(bias_document, change):
    """The patch is put on before its tensors are looked at; nothing of it stays."""
    folder, document, tensors = bias_document
    last = sorted(tensors)[-1]
    write_folder(folder, document, tensors | {last: change(tensors[last])})
    loading(folder, FileError, last.partition(".")[2])


@pytest.mark.parametrize("name", ["-1.0.k_bias", "1.0.k_bias", "x", "", "0.99.k_bias", "0"])
def test_a_tensor_of_no_patch(bias_document, name):
    folder, document, tensors = bias_document
    write_folder(folder, document, tensors | {name: torch.zeros(2)})
    loading(folder, FileError, "folder: ")


def test_a_tensor_that_the_model_cannot_hold(bias_document):
    folder, document, tensors = bias_document
    tensors["0.2.v_bias"][0, 0] = 1e6
    write_folder(folder, document, tensors)
    bs.load_patch(models.planted("llama", torch.bfloat16), folder)
    model = models.planted("llama", torch.float16)
    check(model, lambda m: bs.load_patch(m, folder), LevelOverflow, r"v_bias.*1e\+06.*float16")


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
