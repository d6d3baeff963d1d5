"""`calibrate`: find massive activations and their means in one pass over data."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.adapters.scale import warn_of_scale
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.errors import BadOption, warn
from biassurgery.findings.sites import Sites
from biassurgery.measure.by_blocks import Onload, by_blocks
from biassurgery.measure.confirm import confirm
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.ranks import Group, taking_part

NARROW = 2.0  # smallest massive over largest other value of a channel, below which a warning is due


def calibrate(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    resume: Sites | None = None,
    start: Start = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    onload: Onload = None,
    spill: str | Path | None = None,
    source: str = "",
    progress: bool | None = None,
    tower: Tower | None = None,
    group: Group = None,
) -> Sites:
    """Detect the massive activations of a model and measure what they are worth.

    A channel of a block's output has sites if one of its values has a magnitude beyond
    `min_magnitude` and beyond `min_ratio` times the median magnitude of its sequence's hidden state
    (Sun et al. 2024, section 2). Its gate is then put into the widest gap, on a log scale, below
    the smallest such value, and all values beyond the gate count, by role and, within a role, by
    cluster.

    A few sequences are kept and run once more with the massive values set to zero where they are
    born and where they grow, which tells whether `layers="first"` leaves nothing massive; blocks
    where it does are added to it.

    The data are read once, in evaluation mode and without gradients; hidden states stay on their
    device and memory does not grow with the number of batches. The median is exact. Under
    `torch.distributed` every rank reads its own batches and all get the sum.

    Args:
        model: a model of a supported architecture.
        batches: tensors (`input_ids` (B, T) int64 or `pixel_values` (B, C, H, W)), dicts of the
            model's arguments, or pairs with labels; padding is recognised by `attention_mask` (B,
            T).
        min_magnitude, min_ratio: the definition.
        resume: an earlier result on other data of this model, to be added to.
        start: a token to put in front of every sequence, `<|im_start|>` for example, or its id:
            where the tokenizer adds no BOS, massive activations at the start vary with the first
            word, and behind a constant token they are constants; see `with_start`.
        tokenizer: the model's, where `start` is a token.
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        onload: `"blocks"` takes all batches through one block before the next, so that a model
            larger than memory is read from disk once, however many batches there are; the numbers
            are the same. None: one batch after the other. See docs/scale.md.
        spill: a folder for the hidden states of all batches between two blocks; None: they are kept
            in CPU memory. With a checkpoint it must be given.
        source: what the data are, kept with the sites.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        tower: `vision` (default) or `text`, of a model that has both.
        group: whose data are added up under `torch.distributed`: a `ProcessGroup`; None: the ranks
            that the model's device mesh has for data, else all; False: this rank's alone.

    Raises:
        BadBatch, NonFiniteActivation, UnsupportedModel, Incompatible: see their messages; the
        model is as it was.
        BadOption, FileError: also if `checkpoint` cannot be used, or is of another pass.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("calibrate", model, group) as ranks:
        host = find_host(model, tower)
        check_measurable(host, min_magnitude, min_ratio)
        front = start_id(host, start, tokenizer)
        resumes = resume is not None
        ranks.same(min_magnitude=min_magnitude, min_ratio=min_ratio, resumes=resumes, start=front)
        blocks = by_blocks(host, onload, spill, checkpoint)
        massive = MassiveActivations(host, min_magnitude, min_ratio, source, front)
        if resume is not None:
            check_resumable(resume, massive)
        one_pass = Pass(host, min_magnitude, min_ratio, [massive])
        checked = ranks.apart(behind_start(host, as_batches(host, batches), front))
        one_pass.read(checked, "calibrating", progress, checkpoint, batches, front, blocks)
        one_pass.warn_of_left_out()
        confirm(host, massive)
        sites = ranks.total(massive.result())
    sites = sites if resume is None else resume + sites
    warn_of_narrow_margins(sites)
    return sites


def check_measurable(host: Host, min_magnitude: float, min_ratio: float) -> None:
    """Refuse a definition that makes no sense, and a model without weights."""
    for name, value in (("min_magnitude", min_magnitude), ("min_ratio", min_ratio)):
        if not isinstance(value, Real) or not 0 <= value < float("inf"):
            raise BadOption(
                f"{name}: {value!r}; give a number of at least 0 (the paper's are 100 and 1000)."
            )
    check_loaded(host)
    warn_of_scale(host, "hidden states, which min_magnitude is compared with,")


def check_resumable(resume: Sites, massive: MassiveActivations) -> None:
    """Refuse, before the work, what a new result could not be added to."""
    if not isinstance(resume, Sites):
        raise BadOption(
            f"resume: {type(resume).__name__} is not Sites; pass what an earlier calibrate()"
            " returned, or Sites.load(...)."
        )
    both = resume + massive.result()
    if both.tally is None or both.tally.grown is None:
        warn(
            "resume: sites of an earlier version do not say where values grow; layers='first' will"
            " go by their means. Calibrate anew on all data to know.",
        )


def warn_of_narrow_margins(sites: Sites) -> None:
    """Warn where massive and ordinary values of a channel are less than `NARROW` times apart."""
    narrow = sorted(
        {
            (s.layer, s.channel, s.margin)
            for s in sites
            if s.margin is not None and s.margin < NARROW
        }
    )
    if narrow:
        where = ", ".join(
            f"layer {layer} channel {channel} ({margin:.2f}x)" for layer, channel, margin in narrow
        )
        warn(
            f"sites: massive and other values are less than {NARROW:g}x apart at {where}; a patch"
            " may catch ordinary values there. More data, or a higher min_ratio=, shows whether"
            " these are massive activations.",
        )
