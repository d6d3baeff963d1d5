"""The format `checkpoint`: a rescaled model, as its own library writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.exports.formats import Format, applied_mode
from biassurgery.findings.key_values import KeyValues


class Checkpoint(Format):
    """What `save_pretrained` writes of a model whose weights a patch has changed, and no other."""

    name: ClassVar[str] = "checkpoint"

    def write(self, host: Host, folder: Path, key_values: KeyValues | None) -> None:
        if key_values is not None:
            raise BadOption("key_values: a checkpoint holds none; leave key_values= out.")
        advice = "patch_model(model, 'rescale') first"
        applied_mode(host.root, "rescale", self.name, advice)
        root: Any = host.root
        if not hasattr(root, "save_pretrained"):
            raise UnsupportedModel(
                f"model: {type(root).__name__} has no save_pretrained; save model.state_dict() in"
                " the way of its own library, and keep the factor beside it."
            )
        root.save_pretrained(folder)
