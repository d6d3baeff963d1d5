"""The format `prefix`: key values of a start token, and a loader for stock transformers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.registry import Host
from biassurgery.exports.formats import Format, key_values_of
from biassurgery.findings.files import write_tensors
from biassurgery.findings.key_values import KeyValues
from biassurgery.modes.attention import check_key_values

LOADER = "prefix.py"
TENSORS = "prefix.safetensors"


class Prefix(Format):
    """`prefix.safetensors` (layers, key-value heads, channels) and `prefix.py`."""

    name: ClassVar[str] = "prefix"
    text_only: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False

    def write(self, host: Host, folder: Path, key_values: KeyValues | None) -> None:
        found = checked(host, key_values, self.name)
        tensors = {"keys": found.keys.contiguous(), "values": found.values.contiguous()}
        loader = files("biassurgery.exports").joinpath("loader.py").read_text("utf-8")
        write_tensors(folder / TENSORS, tensors, {"architecture": found.architecture})
        (folder / LOADER).write_text(loader, encoding="utf-8")


def checked(host: Host, given: KeyValues | None, format: str) -> KeyValues:
    """The key values to be written, if they are of this model.

    Raises:
        Incompatible, BadOption: they are not, or not finite.
    """
    found = key_values_of(host, given, format)
    for attention in attentions(host).values():
        check_key_values(host, attention, found)
    return found
