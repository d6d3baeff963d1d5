"""Models, texts and images by name: what is loaded is what was saved, and everything else is
refused with a reason.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.reading import (
    ImageBatches,
    ImageFile,
    bos_token,
    image_files,
    read_text,
    selected,
    text_windows,
)
from tests import vision
from tests.models import planted, tokens
from tests.modes.test_defaults import checkpoint, tokenizer
from tests.state import bits, output_of

TIMM = "test_vit"  # timm's own model for tests: 0.4 M parameters


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# Models


def test_a_transformers_folder(tmp_path: Path) -> None:
    checkpoint(tmp_path, bos=True)
    loaded = load_model(str(tmp_path), device="cpu")
    assert bits(output_of(loaded.model, tokens())) == bits(output_of(planted("llama"), tokens()))
    assert not loaded.model.training
    assert loaded.name == str(tmp_path)
    assert loaded.tokenizer("ab")["input_ids"] == tokenizer(bos=True)("ab")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_the_dtype_is_the_checkpoints_own_or_the_one_asked_for(
    tmp_path: Path, dtype: str | None
) -> None:
    planted("llama", torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=dtype, device="cpu").model
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype or 'bfloat16'}"}


@pytest.mark.parametrize(
    ("family", "loaded_as"),
    [
        ("vit", "ViTForImageClassification"),
        ("dinov3_vit", "DINOv3ViTModel"),
        ("clip_vision", "CLIPVisionModel"),
        ("vit_mae", "ViTMAEModel"),
    ],
)
def test_an_image_model_of_transformers(tmp_path: Path, family: str, loaded_as: str) -> None:
    model = vision.planted(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert type(loaded.model).__name__ == loaded_as
    assert loaded.tokenizer is None
    saved, found = (
        {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        for state in (model.state_dict(), loaded.model.state_dict())
    )
    assert found
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())


def test_a_checkpoint_of_torch_files(tmp_path: Path) -> None:
    model = planted("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(str(tmp_path), device="cpu")
    assert bits(output_of(loaded.model, tokens())) == bits(output_of(model, tokens()))
    assert loaded.tokenizer is None  # there are no files of one


class Payload:
    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('code in a checkpoint was run')",)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    planted("gpt2").config.save_pretrained(tmp_path)
    torch.save({"transformer.wte.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(bs.FileError, match="neither a timm model"):
        load_model(str(tmp_path), device="cpu")


def test_an_incomplete_checkpoint_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    model = planted("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        bs.FileError, match=r"lack 1 parameters, model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        load_model(str(tmp_path), device="cpu")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    planted("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        bs.FileError, match="neither a timm model nor a language model or image model"
    ):
        load_model(str(tmp_path), device="cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model(TIMM).state_dict(), file)
    return file


@pytest.mark.parametrize("name", [TIMM, f"timm/{TIMM}"])
def test_a_timm_model_with_its_weights(vit: Path, name: str) -> None:
    loaded = load_model(name, weights=vit, device="cpu")
    state = loaded.model.state_dict()
    assert {key: bits(value) for key, value in state.items()} == {
        key: bits(value) for key, value in load_file(vit).items()
    }
    assert not loaded.model.training
    assert loaded.tokenizer is None
    half = load_model(name, weights=vit, dtype="bfloat16", device="cpu").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"name": TIMM},
            bs.FileError,
            "no pretrained weights of 'test_vit'.*safetensors file as weights",
        ),
        ({"name": "vit_tiny_patch16_224.nonsense"}, bs.FileError, "no pretrained weights"),
        (
            {"name": TIMM, "weights": Path("absent.safetensors")},
            bs.FileError,
            "absent.safetensors is not a file",
        ),
        (
            {"name": "test_vit2", "weights": "vit"},
            bs.FileError,
            "does not hold the parameters of 'test_vit2'",
        ),
        ({"name": "nobody/nothing"}, bs.FileError, "'nobody/nothing' is neither"),
        ({"name": "nobody/nothing", "weights": "vit"}, bs.BadOption, "is none that timm knows"),
        ({"name": "./absent"}, bs.FileError, "./absent is not a folder"),
        ({"name": TIMM, "dtype": "int8"}, bs.BadOption, "dtype: 'int8'; use one of float32"),
        ({"name": TIMM, "device": "nonsense"}, bs.BadOption, "device: 'nonsense' cannot be used"),
        ({"name": TIMM, "device": "cuda:99"}, bs.BadOption, "device: 'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_loaded(
    vit: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    if arguments.get("weights") == "vit":
        arguments = arguments | {"weights": vit}
    with pytest.raises(error, match=message):
        load_model(**({"device": "cpu"} | arguments))


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(bs.FileError, match="neither"):
        load_model(str(tmp_path), device="cpu")


# Texts


def test_the_bos_policy() -> None:
    plain = tokenizer(bos=False)
    prefixed = tokenizer(bos=True)
    assert [bos_token(plain, "auto"), bos_token(plain, "yes"), bos_token(plain, "no")] == [
        None,
        0,
        None,
    ]
    assert [bos_token(prefixed, "auto"), bos_token(prefixed, "yes"), bos_token(prefixed, "no")] == [
        0,
        0,
        None,
    ]
    plain.bos_token = None
    with pytest.raises(bs.BadOption, match="no BOS token"):
        bos_token(plain, "yes")


def test_a_tokenizer_of_two_special_tokens_must_be_told() -> None:
    from tokenizers import processors

    double = tokenizer(bos=True)
    special = [("<s>", 0), ("<unk>", 95)]
    double.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=special
    )
    with pytest.raises(bs.BadOption, match="2 tokens in front"):
        bos_token(double, "auto")
    assert bos_token(double, "yes") == 0


def test_texts_follow_each_other_without_special_tokens_between() -> None:
    one = "the first text."
    two = "and another one"
    words = tokenizer(bos=True)
    ids = [
        token for text in (one, two) for token in words(text, add_special_tokens=False)["input_ids"]
    ]
    assert len(ids) == 30
    assert text_windows(planted("llama"), words, [one, two], 11, 0).tolist() == [
        [0, *ids[at : at + 10]] for at in (0, 10, 20)
    ]
    assert text_windows(planted("llama"), words, [one, two], 11, None).tolist() == [
        ids[at : at + 11] for at in (0, 11)
    ]


def test_reading_a_text(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes("naïve\n".encode())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert read_text(tmp_path / "good.txt") == "naïve\n"
    for name in ("bad.txt", "absent.txt", "."):
        with pytest.raises(bs.FileError, match="cannot be read"):
            read_text(tmp_path / name)


def test_selection() -> None:
    assert selected(5, "all", None) == [0, 1, 2, 3, 4]
    assert selected(5, "even", None) == [0, 2, 4]
    assert selected(5, "odd", None) == [1, 3]
    assert selected(5, "odd", 1) == [1]
    assert selected(5, "even", 9) == [0, 2, 4]
    for total, split in ((0, "all"), (1, "odd")):
        with pytest.raises(bs.BadBatch, match="leaves none"):
            selected(total, split, None)


# Images


def paint(file: Path, shade: int, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (40, 30), shade)
    image.paste(255 - shade, (0, 0, 20, 10))
    image.convert(mode).save(file)


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


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
    with pytest.raises(bs.FileError, match=message):
        image_files(tmp_path, 10)


def test_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,class_index\n")
    with pytest.raises(bs.FileError, match="names 0 files"):
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
        with pytest.raises(bs.FileError, match=r"holds no images|is not a folder"):
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
    with pytest.raises(bs.FileError, match=r"broken\.png cannot be read"):
        list(ImageBatches([ImageFile(tmp_path / "broken.png")], model, 1))


def test_importing_the_command_line_is_cheap() -> None:
    import subprocess

    code = (
        "import sys, biassurgery.cli; print([name for name in ('transformers', 'timm', 'open_clip',"
        " 'pandas', 'PIL') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
