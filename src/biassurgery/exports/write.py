"""`export`: what a patch does, in files that other libraries run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.registry import find_host
from biassurgery.errors import FileError, UnsupportedModel
from biassurgery.exports.formats import FORMATS
from biassurgery.findings.files import as_path
from biassurgery.findings.key_values import KeyValues


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str,
    key_values: KeyValues | None = None,
) -> None:
    """Write what is on a model so that it runs without this library.

    Args:
        model: a text model of transformers, with the patch that the format holds.
        folder: to write to; it is made.
        format: `prefix`: the start token's key values (of `transplant`, or `key_values=`) and a
            short loader, `prefix.py`, for stock transformers; `cartridge`: the same as an adapter
            of PEFT; `sinks`: a model with `attention_bias` of kind `sink_logit` as a checkpoint of
            `GraniteSWAForCausalLM` (transformers 5); `checkpoint`: a rescaled model.
        key_values: for `prefix` and `cartridge`; None: those of the transplant on the model.

    Raises:
        BadOption: a format that is not known, or the patch that it holds is not on the model.
        UnsupportedModel: the format cannot hold this model, or the installed libraries have no
            class for it.
        FileError: the folder cannot be written.
    """
    kind = FORMATS.find(format)
    host = find_host(model)
    modality = host.adapter.modality
    if modality != "text" and kind.text_only:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[modality]}; format={format!r} is of"
            " text models."
        )
    check_loaded(host)
    folder = as_path("folder", folder)
    try:
        with _made(folder):
            kind().write(host, folder, key_values)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"folder: {folder} cannot be written ({error}).") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Within the block the folder is there; one that is new does not outlive an error."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder)
        raise
