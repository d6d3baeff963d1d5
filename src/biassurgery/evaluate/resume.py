"""Counts that outlive an interruption, in a small JSON file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.errors import FileError
from biassurgery.findings.fields import whole
from biassurgery.findings.files import CORRUPT, as_path, read_json, replacing, told
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
        self.path = as_path("resume", path)
        self.key = key
        self.about = {"measure": name, "modes": [patch.mode.name for patch in patches(model)]}

    def read(self) -> Count:
        """What is counted so far.

        Raises:
            FileError: the file holds something else.
        """
        entry = self._entries().get(self.key, {})
        try:
            counts = {
                field.name: whole(field.name, entry.get(field.name, 0)) for field in fields(Count)
            }
            if counts["right"] > counts["images"]:
                raise ValueError("more right answers than images")
        except CORRUPT as error:
            raise FileError(
                f"resume: {self.path} holds no counts for {self.key} ({told(error)}); delete it, or"
                " name another file."
            ) from error
        return Count(**counts)

    def write(self, count: Count) -> None:
        """Note a count. The file replaces the older one only when it is complete.

        Raises:
            FileError: it cannot be written.
        """
        entries = {**self._entries(), self.key: self.about | asdict(count)}
        with replacing(self.path, "resume") as part:
            document = {"counts": entries, "sha256": _checksum(entries)}
            part.write_text(json.dumps(document, indent=1), encoding="utf-8")

    def _entries(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        document = read_json(
            self.path, "resume", "it is no file of counts: delete it, or name another one"
        )
        if not isinstance(document, dict) or not isinstance(document.get("counts"), dict):
            raise FileError(
                f"resume: {self.path} is no file of counts; delete it, or name another one."
            )
        entries = document["counts"]
        # Earlier versions wrote none.
        if document.get("sha256", _checksum(entries)) != _checksum(entries):
            raise FileError(
                f"resume: {self.path} is damaged, or was edited; delete it, or name another one."
            )
        return entries


def _checksum(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
