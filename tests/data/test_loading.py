"""Models from folders and names, with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from biassurgery.data.loading import load_model
from biassurgery.errors import BadOption, FileError
from tests import vision
from tests.checkpoints import checkpoint, tokenizer
from tests.models import planted, tokens
from tests.state import bits, output_of

TIMM = "test_vit"  # timm's own model for tests: 0.4 M parameters


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


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
    with pytest.raises(FileError, match="neither a timm model"):
        load_model(str(tmp_path), device="cpu")


def test_an_incomplete_checkpoint_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    model = planted("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        FileError, match=r"lack 1 parameters, model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        load_model(str(tmp_path), device="cpu")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    planted("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileError, match="neither a timm model nor a language model or image model"):
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
            FileError,
            "no pretrained weights of 'test_vit'.*safetensors file as weights",
        ),
        ({"name": "vit_tiny_patch16_224.nonsense"}, FileError, "no pretrained weights"),
        (
            {"name": TIMM, "weights": Path("absent.safetensors")},
            FileError,
            "absent.safetensors is not a file",
        ),
        (
            {"name": "test_vit2", "weights": "vit"},
            FileError,
            "does not hold the parameters of 'test_vit2'",
        ),
        ({"name": "nobody/nothing"}, FileError, "'nobody/nothing' is neither"),
        ({"name": "nobody/nothing", "weights": "vit"}, BadOption, "is none that timm knows"),
        ({"name": "./absent"}, FileError, "./absent is not a folder"),
        ({"name": TIMM, "dtype": "int8"}, BadOption, "dtype: 'int8'; use one of float32"),
        ({"name": TIMM, "device": "nonsense"}, BadOption, "device: 'nonsense' cannot be used"),
        ({"name": TIMM, "device": "cuda:99"}, BadOption, "device: 'cuda:99' cannot be used"),
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
    with pytest.raises(FileError, match="neither"):
        load_model(str(tmp_path), device="cpu")
