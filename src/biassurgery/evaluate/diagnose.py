"""`diagnose`: what in a model breaks under int8, float16 and eviction, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.adapters.linears import linears
from biassurgery.adapters.registry import Tower, find_host
from biassurgery.adapters.sharing import sharing
from biassurgery.data.batches import Batch
from biassurgery.data.start import Start
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.evaluate.quantised import check_again, measured
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.measure.by_blocks import Onload
from biassurgery.measure.diagnose import diagnosed
from biassurgery.measure.ranks import Group, taking_part


def diagnose(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    start: Start = None,
    tokenizer: Any = None,
    measure: bool = False,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    onload: Onload = None,
    spill: str | Path | None = None,
    source: str = "",
    progress: bool | None = None,
    tower: Tower | None = None,
    group: Group = None,
) -> Diagnosis:
    """Find out which parts of a model break under int8, float16 and eviction, why, and what to do.

    The data are read once, in evaluation mode and without gradients, and what every linear layer in
    the blocks reads is measured, with and without the tokens that carry massive activations: a
    static scale for all tokens has to hold both. Then at most five forwards on a short sequence of
    the data look for super weights (Yu et al. 2024) and confirm them, and show what it costs when
    the first token leaves the cache. No parameter is changed: what a weight contributes is
    subtracted. Memory does not grow with the number of batches.

    Diagnoses of several ranks of `torch.distributed` are not added up: give one rank all the data,
    and `group=False`.

    Args:
        model: a model of a supported architecture, in a dtype that holds its values: float32 or
            bfloat16. Quantised linear layers are measured like others.
        batches: tensors (`input_ids` (B, T) int64 or `pixel_values` (B, C, H, W)), dicts of the
            model's arguments, or pairs with labels; padding is recognised by `attention_mask` (B,
            T). As the model is used: with the BOS token in front, if it gets one.
        start: a token to put in front of every sequence, `<|im_start|>` for example, or its id; see
            `calibrate`.
        tokenizer: the model's, for the text of tokens in the report; None: their ids only.
        measure: also take the perplexity of the batches, as the model is and under each remedy
            (the ignore list, `pin`, `transplant`), in floating point and with fake int8: weights
            only, static scales, one a forward, one a token. Up to twenty evaluations; static scales
            are set on the same batches. They are in `Diagnosis.measured`.
        min_magnitude, min_ratio: a value is massive if its magnitude is above the one, and above
            the other times the median magnitude of its sequence (Sun et al. 2024, section 2).
        onload, spill: for a model larger than memory, see `calibrate`; not with `measure`, whose
            evaluations read all blocks one batch after the other.
        source: what the data are, kept with the diagnosis.
        progress: show a progress bar; None: only on a terminal.
        tower: `vision` (default) or `text`, of a model that has both.
        group: False: this rank's data alone, whatever others do; None is refused where several
            ranks would take part in `calibrate`.

    Raises:
        BadBatch: no data, or sequences of one token only, which cannot be compared with anything.
        NonFiniteActivation: NaN or infinity, as in float16 where it overflows: load the model in
            bfloat16.
        UnsupportedModel, BadOption: see their messages; the model is as it was.
    """
    if measure:
        _check_evaluations(batches, onload)
    _check_alone(model, group)
    with taking_part("diagnose", model, False):  # and so do the evaluations inside
        found = diagnosed(
            model,
            batches,
            start=start,
            tokenizer=tokenizer,
            min_magnitude=min_magnitude,
            min_ratio=min_ratio,
            onload=onload,
            spill=spill,
            source=source,
            progress=progress,
            tower=tower,
        )
        if not measure:
            return found
        cells, notes = measured(model, batches, found, start=start, tokenizer=tokenizer)
    return replace(found, measured=cells, notes=(*found.notes, *notes))


def _check_evaluations(batches: Any, onload: Onload) -> None:
    """Refuse what the evaluations of remedies cannot read."""
    check_again(batches)
    if onload is not None:
        raise BadOption(
            f"measure: True, with onload={onload!r}; the evaluations of remedies read the whole"
            " model for every batch. Leave one of the two out."
        )


def _check_alone(model: nn.Module, group: Group) -> None:
    """Refuse several ranks: what each finds would be of its own data, and say nothing of that."""
    shared = sharing(model, group)
    if shared is None:
        return
    linears(find_host(model))  # a model that is split over ranks is refused by itself
    raise UnsupportedModel(
        f"group: {group!r}, by which the ranks {', '.join(map(str, shared.ranks))} would take part,"
        " and diagnoses are not added up; let one rank, with a whole model, read all the data and"
        " pass group=False there."
    )
