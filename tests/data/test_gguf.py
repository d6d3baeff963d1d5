"""GGUF files: the same model as the one that was written, its tokenizer as the file says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import biassurgery as bs
from biassurgery.data import loading
from biassurgery.data.converting import convert
from biassurgery.data.loading import load_model
from biassurgery.data.tokenizers import read_tokenizer
from biassurgery.errors import BadOption, FileError, MissingPackage
from tests.gguf_files import AB_1, write_gguf
from tests.models import tokens
from tests.state import bits, output_of

pytest.importorskip("gguf", reason="needs gguf (the gguf extra)")


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_the_model_and_the_tokenizer_are_those_of_the_file(
    tmp_path: Path, as_folder: bool, bos: bool
) -> None:
    file = tmp_path / "model.gguf"
    written = write_gguf(file, bos=bos)
    loaded = load_model(str(tmp_path if as_folder else file), device="cpu")
    torch.testing.assert_close(
        output_of(loaded.model, tokens()), output_of(written, tokens()), rtol=0, atol=1e-5
    )
    tokenizer = loaded.tokenizer
    assert tokenizer("ab 1")["input_ids"] == ([0] if bos else []) + AB_1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.decode(AB_1) == "ab 1"
    front = bs.with_start(loaded.model, tokenizer("ab 1", return_tensors="pt"), 3)
    written.generate(**front, max_new_tokens=1)  # it refuses arguments that it does not know
    assert set(front) == {"input_ids", "attention_mask"}


def test_a_dtype(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    assert load_model(str(tmp_path), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert load_model(str(tmp_path), device="cpu").model.dtype == torch.float32


def test_a_folder_with_a_config_is_read_as_that(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", bos=False)
    written = write_gguf(tmp_path / "scratch.gguf")
    (tmp_path / "scratch.gguf").unlink()
    written.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert bits(output_of(loaded.model, tokens())) == bits(output_of(written, tokens()))
    assert loaded.tokenizer is None


def test_zero_argument_patching_finds_the_tokenizer_in_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    model = load_model(str(tmp_path / "b.gguf"), device="cpu").model
    before = output_of(model, tokens())
    with pytest.warns(UserWarning, match=r"tokenizer of .*b\.gguf with BOS"):
        bs.patch_model(model, "set_zero")
    assert not torch.equal(output_of(model, tokens()), before)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("architecture", "of architecture 'nonsense', which this version of transformers"),
        ("truncated header", "cannot be read as GGUF"),
        ("truncated weights", "cannot be read as GGUF"),
        ("text", "cannot be read as GGUF"),
        ("empty file", "cannot be read as GGUF"),
        ("two", "holds 2 GGUF files, model.gguf and other.gguf among them; give the path of one"),
        ("empty folder", "empty folder, with neither config.json and weights nor a GGUF file"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, kind: str, message: str) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, architecture="nonsense" if kind == "architecture" else "llama")
    whole = file.read_bytes()
    contents = {
        "truncated header": whole[:500],
        "truncated weights": whole[: len(whole) // 2],
        "text": b"GGUF, or so it says",
        "empty file": b"",
    }
    file.write_bytes(contents.get(kind, whole))
    if kind == "two":
        write_gguf(tmp_path / "other.gguf")
    if kind == "empty folder":
        file.unlink()
    with pytest.raises(FileError, match=message) as refused:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(refused.value)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tokenizer=False)
    assert load_model(str(file), device="cpu").tokenizer is None


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gguf")
    monkeypatch.setattr("biassurgery.data.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'biassurgery\[gguf\]'"):
        load_model(str(tmp_path), device="cpu")


def test_convert_writes_what_transformers_reads(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", bos=False)
    folder = tmp_path / "above" / "plain"
    convert(str(tmp_path / "model.gguf"), folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(
        output_of(plain, tokens()), output_of(written, tokens()), rtol=0, atol=1e-5
    )
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer("ab 1")["input_ids"] == AB_1
    plain.save_pretrained(tmp_path / "again")
    assert [path.name for path in folder.parent.iterdir()] == ["plain"]


@pytest.mark.parametrize("there", ["folder", "file"])
def test_convert_overwrites_nothing(tmp_path: Path, there: str) -> None:
    write_gguf(tmp_path / "model.gguf")
    target = tmp_path / "plain"
    if there == "folder":
        target.mkdir()
        (target / "note").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(FileError, match="plain is there already; give a new one"):
        convert(str(tmp_path / "model.gguf"), target)
    assert (target / "note" if there == "folder" else target).read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf")
    target = tmp_path / "plain"
    target.mkdir()  # an empty one is as good as none
    load = loading.read_tokenizer

    def interrupted_at_the_end(name: str) -> object:
        tokenizer = load(name)

        def interrupt(folder: Path) -> None:
            assert (folder / "model.safetensors").exists()
            assert not any(target.iterdir())
            raise KeyboardInterrupt

        tokenizer.save_pretrained = interrupt
        return tokenizer

    with monkeypatch.context() as faults:
        faults.setattr(loading, "read_tokenizer", interrupted_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            convert(str(tmp_path / "model.gguf"), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "plain"]
    assert not any(target.iterdir())
    convert(str(tmp_path / "model.gguf"), target)
    assert (target / "model.safetensors").exists()


def test_a_model_of_timm_has_no_such_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.setattr(loading, "_timm_model", lambda name, weights: timm.create_model(name))
    with pytest.raises(BadOption, match="'test_vit' is a timm model"):
        convert("test_vit", tmp_path / "plain")
