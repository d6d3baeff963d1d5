"""Reading and writing files with errors that name the file.

A safetensors file that is written here carries, in its metadata, the SHA-256 of all that it says:
the other metadata, and the name, dtype, shape and bytes of every tensor. Reading compares it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from biassurgery.errors import FileError

# what the contents of a file that is not what it should be make Python raise
CORRUPT: tuple[type[Exception], ...] = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    AssertionError,
    EOFError,
    struct.error,
)
CHECKSUM = "biassurgery.sha256"  # its name among the metadata
_LARGEST_JSON = 100_000_000  # bytes, as safetensors has it for its own header
_LONGEST_MESSAGE = 400


def as_path(argument: str, name: object) -> Path:
    """The name of a file or folder, as a path that the system can look up.

    Raises:
        FileError: it is no name, or one that no file can have.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise FileError(f"{argument}: {name!r}; give the name of a file or folder.")
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        _check_home(argument, os.fsdecode(name))  # it may be about to be written; else who opens it
    except (OSError, ValueError, TypeError) as error:  # too long, a zero byte, bytes
        shown = repr(name) if len(repr(name)) <= 100 else f"{repr(name)[:100]}..."
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{argument}: {shown} cannot be a file ({reason}); check it.") from error
    return Path(os.fsdecode(name))


def _check_home(argument: str, name: str) -> None:
    """Refuse `~/...`, which a shell expands and Python does not: it would make a folder `~`."""
    expanded = os.path.expanduser(name)
    if expanded != name and not Path(Path(name).parts[0]).exists():
        raise FileError(f"{argument}: {name!r} is for a shell to expand; give {expanded!r}.")


@contextmanager
def replacing(path: Path, argument: str = "path") -> Iterator[Path]:
    """Where to write a new version of a file: it takes the old one's place when it is complete.

    That is one rename, of a file that is on the disk by then.

    Args:
        path: of the file; its folder is made.
        argument: what it was given as, for messages.

    Raises:
        FileError: its folder cannot be made, or the file not be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        try:
            yield part
            _sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{argument}: cannot write {path} ({error}); choose a folder that can be written to."
        ) from error


@contextmanager
def new_folder(path: Path, argument: str = "folder") -> Iterator[Path]:
    """Where to write the files of a folder: it gets its name when all of them are on the disk.

    Args:
        path: of the folder; those above it are made.
        argument: what it was given as, for messages.

    Raises:
        FileError: something is there already, or it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        check_new(path, argument)
        part.mkdir(parents=True)
        try:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    _sync(file)
            part.replace(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{argument}: cannot write {path} ({error}); choose a folder that can be written to."
        ) from error


def check_new(path: Path, argument: str) -> None:
    """Raise `FileError` where there is something already, other than an empty folder."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise FileError(f"{argument}: {path} is there already; give a new one, or remove it.")


def _sync(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("r+b") as written:
        os.fsync(written.fileno())


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError, RecursionError: it is no JSON, or says a name twice.
    """
    return json.loads(text, object_pairs_hook=_once_each)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return items


def read_json(path: Path, argument: str, advice: str) -> Any:
    """What a JSON file says.

    Args:
        path: of the file.
        argument: what it was given as, for messages.
        advice: what to do where it cannot be read, for messages.

    Raises:
        FileError: missing, not a file, too large, or no JSON.
    """
    if not path.is_file():
        raise FileError(f"{argument}: {path} is not a file; {advice}.")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON:,} bytes")
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, *CORRUPT) as error:
        raise FileError(
            f"{argument}: {path} cannot be read as JSON ({told(error)}); {advice}."
        ) from error


def told(error: BaseException) -> str:
    """What an error says, cut where it says a whole file."""
    text = repr(error)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file in its folder, which is made; it replaces a file when complete.

    Raises:
        FileError: the file cannot be written.
    """
    with replacing(as_path("path", path)) as part:
        save_tensors(part, tensors, metadata)


def save_tensors(
    part: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file with its checksum, which is returned.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies: two tensors of a file must not share their memory.
    on_cpu = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    checksum = checksum_of(on_cpu, metadata)
    try:
        save_file(on_cpu, part, {**metadata, CHECKSUM: checksum})
    except SafetensorError as error:  # its name for an OSError, among others
        raise OSError(error) from error
    return checksum


def read_tensors(
    path: str | Path, argument: str = "path"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file, which agree with its checksum.

    `CHECKSUM` is not among the metadata where it has none.

    Args:
        path: of the file.
        argument: what it was given as, for messages.

    Raises:
        FileError: missing, unreadable, truncated, damaged, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = as_path(argument, path)
    if not path.is_file():
        raise FileError(f"{argument}: {path} is not a file; check the name.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
        _check_names(path)
    except (OSError, SafetensorError, RuntimeError, *CORRUPT) as error:
        raise FileError(
            f"{argument}: {path} cannot be read as safetensors ({told(error)}); it may be truncated"
            " or of another format."
        ) from error
    said = metadata.get(CHECKSUM)
    rest = {name: value for name, value in metadata.items() if name != CHECKSUM}
    if said is not None and said != checksum_of(tensors, rest):
        raise FileError(
            f"{argument}: {path} is damaged, for its contents do not give the checksum in it; fetch"
            " or write it again."
        )
    return tensors, metadata


def _check_names(path: Path) -> None:
    """Raise `ValueError` if the header has two entries of a name: safetensors takes the last."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(length).decode())


def checksum_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata and of the name, dtype, shape and bytes of tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        said = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(said).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
