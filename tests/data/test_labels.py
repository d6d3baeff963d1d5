"""Folders of images, with labels and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from biassurgery.data.loading import load_model
from biassurgery.data.reading import (
    ImageBatches,
    ImageFile,
    image_files,
)
from biassurgery.errors import FileError
from tests.photographs import paint, write_table
from tests.state import bits

TIMM = "test_vit"  # timm's own model for tests: 0.4 M parameters


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model(TIMM).state_dict(), file)
    return file


def test_labels_from_a_table(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPEG", "unlisted.png"):
        paint(tmp_path / name, 50)
    write_table(
        tmp_path,
        [
            {"file": "b.png", "class_index": 7, "name": "dog"},
            {"file": "a.JPEG", "class_index": 3, "name": "cat"},
        ],
    )
    assert image_files(tmp_path, 10) == [
        ImageFile(tmp_path / "a.JPEG", 3),
        ImageFile(tmp_path / "b.png", 7),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a.png", "label": 3}], "it needs file and class_index"),
        ([{"picture": "a.png", "class_index": 3}], "it needs file and class_index"),
        ([{"file": "a.png", "class_index": "dog"}], "its class as a number"),
        ([{"file": "a.png", "class_index": ""}], "its class as a number"),
        (
            [{"file": "a.png", "class_index": 3}, {"file": "absent.png", "class_index": 4}],
            r"2 files, of which 1 are absent \['absent.png'\]",
        ),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    paint(tmp_path / "a.png", 50)
    write_table(tmp_path, rows)
    with pytest.raises(FileError, match=message):
        image_files(tmp_path, 10)


def test_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,class_index\n")
    with pytest.raises(FileError, match="names 0 files"):
        image_files(tmp_path, 10)


def test_labels_from_sub_folders(tmp_path: Path) -> None:
    for name in ("10/x.png", "9/z.png", "9/y.png", "notes/readme.txt"):
        paint(tmp_path / name, 50) if name.endswith("png") else (tmp_path / "notes").mkdir()
    found = {
        file.path.relative_to(tmp_path).as_posix(): file.label
        for file in image_files(tmp_path, 1000)
    }
    assert found == {"10/x.png": 10, "9/y.png": 9, "9/z.png": 9}


def test_names_of_classes_need_all_classes(tmp_path: Path) -> None:
    for name in ("dog/x.png", "cat/y.png"):
        paint(tmp_path / name, 50)
    assert [(file.path.name, file.label) for file in image_files(tmp_path, 2)] == [
        ("y.png", 0),
        ("x.png", 1),
    ]
    assert [file.label for file in image_files(tmp_path, 1000)] == [
        None,
        None,
    ]  # which 2 of the 1000 cannot be told


def test_images_without_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        paint(tmp_path / name, 50)
    assert image_files(tmp_path, 10) == [
        ImageFile(tmp_path / "a.jpg"),
        ImageFile(tmp_path / "b.png"),
    ]


def test_folders_without_images(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileError, match=r"holds no images|is not a folder"):
            image_files(folder, 10)


def test_images_are_prepared_as_timm_does_it(vit: Path, tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]

    model = load_model(TIMM, weights=vit, dtype="bfloat16", device="cpu").model
    files = [ImageFile(tmp_path / f"{shade}.png", shade) for shade in (10, 90, 170)]
    for file in files:
        paint(file.path, file.label or 0, mode="L" if file.label == 90 else "RGB")
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    expected = [transform(Image.open(file.path).convert("RGB")).bfloat16() for file in files]
    batches = ImageBatches(files, model, batch_size=2)
    assert len(batches) == 2
    for _ in range(2):  # it can be read more than once
        (first, labels), (last, label) = batches
        assert bits(torch.cat([first, last])) == bits(torch.stack(expected))
        assert (labels.tolist(), label.tolist()) == ([10, 90], [170])
        assert labels.dtype == torch.int64
    assert not torch.equal(expected[0], expected[1])
    unlabelled = list(ImageBatches([ImageFile(file.path) for file in files], model, batch_size=8))
    assert bits(unlabelled[0]) == bits(torch.stack(expected))


def test_a_broken_image_is_named(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    model = load_model(TIMM, weights=vit, device="cpu").model
    with pytest.raises(FileError, match=r"broken\.png cannot be read"):
        list(ImageBatches([ImageFile(tmp_path / "broken.png")], model, 1))
