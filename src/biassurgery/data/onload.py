"""A checkpoint that is larger than memory: its blocks stay on disk until they are run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.adapters.registry import Host, find_host
from biassurgery.errors import FileError, MissingPackage, first_line

_DISK = "disk"


def device_map_of(model: nn.Module, device: str) -> dict[str, str]:
    """A `device_map` for `from_pretrained`: the blocks and the head on disk, the rest on a device.

    A head that is tied to the embeddings is where these are.

    Args:
        model: of the same architecture, on the meta device.
        device: where the model will run.

    Raises:
        UnsupportedModel: no adapter knows the model.
    """
    host = find_host(model)
    blocks = set(host.blocks)
    return dict(_places(host, model, "", device, blocks))


def _places(
    host: Host, module: nn.Module, name: str, device: str, blocks: set[nn.Module]
) -> Iterator[tuple[str, str]]:
    """The largest parts of a module that are in one place, each with that place."""
    if module in blocks:
        yield name, _DISK
    elif blocks.isdisjoint(module.modules()):
        yield name, _DISK if _is_own_head(host, module) else device
    else:
        prefix = f"{name}." if name else ""
        here = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for own, _ in here:
            yield f"{prefix}{own}", device
        for own, child in module.named_children():
            yield from _places(host, child, f"{prefix}{own}", device, blocks)


def _is_own_head(host: Host, module: nn.Module) -> bool:
    """Whether a module is no part of the body, and has weights of its own."""
    body = host.adapter.body(host.model)
    config: Any = host.root.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tied = getattr(text, "tie_word_embeddings", True)
    return not tied and module not in set(body.modules())


def offload_folder(model_name: str, folder: Path | None) -> Path:
    """A new folder for weights that a checkpoint does not hold as the model has them.

    Args:
        model_name: for the message.
        folder: where it is made; None: where temporary files are.

    Raises:
        MissingPackage: accelerate is not installed.
        FileError: the folder cannot be made.
    """
    if find_spec("accelerate") is None:
        raise MissingPackage(
            f"onload: the weights of {model_name} are brought block by block by accelerate, which"
            " is not installed; pip install accelerate."
        )
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="biassurgery-weights-", dir=folder))
    except OSError as error:
        raise FileError(
            f"spill: {folder} cannot be written ({first_line(error)}); give another folder."
        ) from error


def removed_with(model: nn.Module, folder: Path) -> None:
    """Remove a folder when the model is gone, or the process ends."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
