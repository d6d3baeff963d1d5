"""Counts that outlive an interruption, in a small JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.errors import FileError
from biassurgery.findings.files import replacing
from biassurgery.patching import patches


@dataclass(frozen=True)
class Count:
    """How far an evaluation has come."""

    batches: int = 0
    right: int = 0
    images: int = 0


class CountFile:
    """The count of one evaluation, among those of others in one file.

    Evaluations are told apart by `key`, a fingerprint of the model's weights and patches, of the
    head and of the first batch. So the modes of `compare` can share a file, and one that is
    finished is not run again, but a model that has changed is counted anew.
    """

    def __init__(self, path: str | Path, key: str, name: str, model: nn.Module) -> None:
        self.path = Path(path)
        self.key = key
        self.about = {"measure": name, "modes": [patch.mode.name for patch in patches(model)]}

    def read(self) -> Count:
        """What is counted so far.

        Raises:
            FileError: the file holds something else.
        """
        entry = self._entries().get(self.key, {})
        try:
            return Count(**{field.name: int(entry.get(field.name, 0)) for field in fields(Count)})
        except (AttributeError, TypeError, ValueError) as error:
            raise FileError(
                f"resume: {self.path} holds no counts for {self.key} ({error}); delete it, or name"
                " another file."
            ) from error

    def write(self, count: Count) -> None:
        """Note a count. The file replaces the older one only when it is complete.

        Raises:
            FileError: it cannot be written.
        """
        entries = {**self._entries(), self.key: self.about | asdict(count)}
        with replacing(self.path, "resume") as part:
            part.write_text(json.dumps({"counts": entries}, indent=1), encoding="utf-8")

    def _entries(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8"))["counts"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileError(
                f"resume: {self.path} is no file of counts ({error}); delete it, or name another"
                " one."
            ) from error
