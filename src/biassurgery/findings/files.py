"""Reading and writing files with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
)


def as_path(argument: str, name: object) -> Path:
    """The name of a file or folder, as a path that the system can look up.

    Raises:
        FileError: it is no name, or one that no file can have.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise FileError(f"{argument}: {name!r}; give the name of a file or folder.")
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # it may be about to be written; else who opens it says so
    except (OSError, ValueError, TypeError) as error:  # too long, a zero byte, bytes
        shown = repr(name) if len(repr(name)) <= 100 else f"{repr(name)[:100]}..."
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{argument}: {shown} cannot be a file ({reason}); check it.") from error
    return Path(os.fsdecode(name))


@contextmanager
def replacing(path: Path, argument: str = "path") -> Iterator[Path]:
    """Where to write a new version of a file: it takes the old one's place when it is complete.

    Args:
        path: of the file; its folder is made.
        argument: what it was given as, for messages.

    Raises:
        FileError: its folder cannot be made, or the file not be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"{argument}: cannot write {path} ({error}); choose a folder that can be written to."
        ) from error


def write_tensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file in its folder, which is made; it replaces a file when complete.

    Raises:
        FileError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(as_path("path", path)) as part:
        try:
            save_file(on_cpu, part, metadata)
        except SafetensorError as error:  # its name for an OSError, among others
            raise OSError(error) from error


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises:
        FileError: missing, unreadable, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = as_path("path", path)
    if not path.is_file():
        raise FileError(f"path: {path} is not a file; check the name.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"path: {path} cannot be read as safetensors ({error}); it may be truncated or of"
            " another format."
        ) from error
