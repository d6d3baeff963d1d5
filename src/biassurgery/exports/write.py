"""`export`: what a patch does, in files that other libraries run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.registry import Host, find_host
from biassurgery.adapters.sharing import needed_ranks
from biassurgery.errors import UnsupportedModel
from biassurgery.exports.formats import FORMATS, Format
from biassurgery.findings.files import as_path, new_folder
from biassurgery.findings.key_values import KeyValues
from biassurgery.measure.together import together


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
        folder: a new one; it gets its name when all of it is written.
        format: `prefix`: the start token's key values (of `transplant`, or `key_values=`) and a
            short loader, `prefix.py`, for stock transformers; `cartridge`: the same as an adapter
            of PEFT; `sinks`: a model with `attention_bias` of kind `sink_logit` as a checkpoint of
            `GraniteSWAForCausalLM` (transformers 5); `checkpoint`: a rescaled model.
        key_values: for `prefix` and `cartridge`; None: those of the transplant on the model.

    Raises:
        BadOption: a format that is not known, or the patch that it holds is not on the model.
        UnsupportedModel: the format cannot hold this model, or the installed libraries have no
            class for it.
        FileError: the folder is there already, or cannot be written.
        RankFailed: another of the ranks that run this model together has failed, or does not
            answer.
    """
    with together("export", model) as ranks:
        kind, host = _checked(model, format)
        path = as_path("folder", folder)
        ranks.same(folder=str(path.absolute()), format=format)  # all have come so far

        def write() -> None:
            with new_folder(path) as part:
                kind().write(host, part, key_values)

        ranks.by_one(write)


def _checked(model: nn.Module, format: str) -> tuple[type[Format], Host]:
    """The format and the model, if the one can hold the other."""
    kind = FORMATS.find(format)
    host = find_host(model)
    modality = host.adapter.modality
    if modality != "text" and kind.text_only:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[modality]}; format={format!r} is of"
            " text models."
        )
    if kind.reads_weights and (ranks := needed_ranks(host.root)):
        raise UnsupportedModel(
            f"model: its weights lie on the ranks {list(ranks)}, and format={format!r} writes them"
            " whole; save_patch(model, ...) here, load_patch on a model of one process, and export"
            " that."
        )
    check_loaded(host)
    return kind, host
