"""What waits between two blocks while other batches go through: in memory, or in files.

Of each batch, the hidden state that it has come to, and what statistics know of it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from biassurgery.errors import FileError, first_line
from biassurgery.findings.files import CORRUPT, as_path, parse_json, told
from biassurgery.findings.state import pack, unpack

_KEY = "biassurgery_states"


class Waiting(NamedTuple):
    """One batch between two blocks.

    Attributes:
        hidden: what the block has returned, on the CPU; None: it was the last one.
        known: what the statistics know of the batch.
    """

    hidden: Tensor | None
    known: Any


class InMemory:
    """The batches of one block take the places of those of the block before."""

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}

    def put(self, layer: int, index: int, waiting: Waiting) -> None:
        """Keep batch number `index` behind a block."""
        self._waiting[index] = waiting

    def get(self, layer: int, index: int) -> Waiting:
        """That batch behind that block."""
        return self._waiting[index]

    def forget_but(self, *layers: int) -> None:
        """Give up what waits behind other blocks than these: the latest is in its place already."""


class InFiles:
    """One folder a block, one file a batch; as many as the blocks that are not given up.

    Args:
        folder: is made if it is not there.
        name: of the pass, so that it finds its files again; None: one that no other has.

    Raises:
        FileError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, name: str | None) -> None:
        parent = as_path("spill", folder)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if name is None:
                self.folder = Path(tempfile.mkdtemp(prefix="blocks-", dir=parent))
            else:
                self.folder = parent / f"blocks-{name}"
                self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FileError(
                f"spill: {folder} cannot be a folder of hidden states ({first_line(error)}); give"
                " another."
            ) from error

    def put(self, layer: int, index: int, waiting: Waiting) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        document = json.dumps(pack(tuple(waiting), tensors))
        file = self._file(layer, index)
        try:
            file.parent.mkdir(exist_ok=True)
            save_file(tensors, file, {_KEY: document})
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"spill: {file} cannot be written ({first_line(error)}); hidden states of all"
                " batches wait there up to three times over: see that there is room."
            ) from error

    def get(self, layer: int, index: int) -> Waiting:
        from safetensors import safe_open

        file = self._file(layer, index)
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                document = opened.metadata()[_KEY]
            return Waiting(*unpack(parse_json(document), tensors))
        except (OSError, *CORRUPT) as error:
            raise FileError(
                f"spill: {file}, which the checkpoint needs, cannot be read ({told(error)}); give"
                " the folder of the pass that was interrupted, or delete the checkpoint."
            ) from error

    def forget_but(self, *layers: int) -> None:
        kept = {self._file(layer, 0).parent for layer in layers}
        for folder in set(self.folder.iterdir()) - kept:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Give up everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, layer: int, index: int) -> Path:
        return self.folder / str(layer) / f"{index}.safetensors"
