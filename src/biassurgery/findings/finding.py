"""What every finding is: measured on one model, finite, and kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from biassurgery.errors import BadOption, FileError, Incompatible, warn
from biassurgery.findings.fields import LARGEST
from biassurgery.findings.files import (
    CHECKSUM,
    CORRUPT,
    parse_json,
    read_tensors,
    told,
    write_tensors,
)

FORMAT = 1
_WORDS = {"layers": "number of layers", "width": "hidden size"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AnyFinding = TypeVar("AnyFinding", bound="Finding")


class Finding:
    """Base of `Sites`, `KeyValues`, `RegisterMeans` and `RegisterNeurons`.

    Each is a safetensors file of its tensors, whose metadata hold the rest as JSON, and a checksum
    of both.

    Attributes:
        file_key: of the JSON in the metadata.
        what: the finding in words.
    """

    __slots__ = ()
    file_key: ClassVar[str]
    what: ClassVar[str]

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON."""
        raise NotImplementedError  # abstract

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        raise NotImplementedError  # abstract

    def check(self) -> None:
        """Raise `BadOption` if it is not what it says: shapes, dtypes, numbers that are not finite.

        It is asked where it is made, and again where it is used, for tensors can be written to.
        """
        check_finite(self.file_key.rpartition(".")[2], self.tensors(), "measure it again")

    @classmethod
    def from_header(
        cls: type[AnyFinding], header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> AnyFinding:
        """Rebuild it from its JSON form, of which nothing is taken for granted, and its tensors."""
        raise NotImplementedError  # abstract

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it replaces an older one only when it is complete.

        Args:
            path: of the file; its folder is made.

        Raises:
            BadOption: it has been written to since it was made, and is no longer finite.
            FileError: the file cannot be written.
        """
        self.check()
        header = {"format": FORMAT} | self.header()
        write_tensors(path, self.tensors(), {self.file_key: json.dumps(header)})

    @classmethod
    def load(cls: type[AnyFinding], path: str | Path) -> AnyFinding:
        """Read what `save` wrote. Nothing but safetensors is read: no pickle is ever executed.

        A file of an earlier version has no checksum; a warning says so.

        Args:
            path: of the file.

        Raises:
            FileError: missing, truncated, damaged, of another kind, written by a newer version, or
                with numbers that are not finite.
        """
        tensors, metadata = read_tensors(path)
        if cls.file_key not in metadata:
            holds = ", ".join(sorted(metadata.keys() - {CHECKSUM})) or "no findings"
            raise FileError(
                f"path: {path} holds {holds}, not {cls.what}; pass a file written by"
                f" {cls.__name__}.save()."
            )
        try:
            header = _read_header(metadata, cls.file_key)
            if type(header["format"]) is not int or header["format"] != FORMAT:
                raise FileError(
                    f"path: {path} holds {cls.what} of format {header['format']!r}, this version"
                    f" reads {FORMAT}; update biassurgery."
                )
            finding = cls.from_header(header, tensors)
        except CORRUPT as error:
            raise FileError(
                f"path: {path} does not hold {cls.what} that can be read ({told(error)}); pass a"
                f" file written by {cls.__name__}.save()."
            ) from error
        if CHECKSUM not in metadata:
            warn(
                f"path: {path} is of an earlier version and has no checksum, so that damage"
                f" would not be noticed; {cls.__name__}.load(path).save(path) adds one.",
            )
        return finding


def _read_header(metadata: dict[str, str], key: str) -> dict[str, Any]:
    """The JSON of a file.

    Version 0.1.0 wrote that of key values and means as a bare format number, with the rest beside
    it: {key: "1", "count": "8", "architecture": "llama"}.
    """
    header = parse_json(metadata[key])
    if type(header) is int:
        return {**metadata, "format": header, "count": int(metadata["count"])}
    return header


def check_tensors(argument: str, tensors: Mapping[str, object], advice: str) -> None:
    """Raise `BadOption` if something is no tensor of real numbers in memory, or is empty."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise BadOption(f"{argument}: {name} is a {type(tensor).__name__}; {advice}.")
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.dtype not in _DTYPES or not tensor.numel():
            kind = tensor.dtype if dense else f"{tensor.layout} on {tensor.device}"
            raise BadOption(
                f"{argument}: {name} is {kind} of shape {tuple(tensor.shape)}, not float32 of at"
                f" least one number; {advice}."
            )


def check_finite(argument: str, numbers: Mapping[str, Tensor | float | None], advice: str) -> None:
    """Raise `BadOption` if one of the numbers of a finding is NaN, infinite, or no float32.

    Args:
        argument: what the finding is given as.
        numbers: by name; None: not known.
        advice: what to do, for the message.
    """
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            finite = bool(value.isfinite().all())
        else:
            finite = value is None or abs(value) <= LARGEST
        if not finite:
            raise BadOption(f"{argument}: {name} is not finite (NaN or infinity); {advice}.")


def check_spread(argument: str, deviations: Mapping[str, Tensor | None]) -> None:
    """Raise `BadOption` if a standard deviation is negative: it would hide a large one."""
    for name, std in deviations.items():
        if std is not None and bool((std < 0).any()):
            raise BadOption(f"{argument}: {name} is negative somewhere; measure it again.")


def check_fits(
    argument: str, measured_on: Mapping[str, Any], model: Mapping[str, Any], advice: str
) -> None:
    """Raise `Incompatible` if a finding is of another model.

    Args:
        argument: what the finding is given as.
        measured_on: facts of the model that it was measured on; None: not known and not checked.
        model: the same facts of the model at hand.
        advice: what to do, for the message.
    """
    for name, value in measured_on.items():
        if value is not None and value != model[name]:
            raise Incompatible(
                f"{argument}: they were measured on a model whose {_WORDS.get(name, name)} is"
                f" {value!r}, this one's is {model[name]!r}; {advice}."
            )


def check_adds_up(
    argument: str, left: Mapping[str, Any], right: Mapping[str, Any], advice: str
) -> None:
    """Raise `Incompatible` if two findings are not of one model and one definition.

    Args:
        argument: what they are.
        left, right: the same facts of both; what is not known must not be known of either.
        advice: what to do, for the message.
    """
    for name, value in left.items():
        if value != right[name]:
            raise Incompatible(
                f"{argument}: {name} is {value!r} on the left and"
                f" {right[name]!r} on the right; {advice}."
            )
