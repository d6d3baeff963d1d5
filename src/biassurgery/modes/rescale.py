"""The mode that makes the residual stream smaller, so that float16 holds it: weights only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.halves import Half
from biassurgery.adapters.layers import Layers
from biassurgery.adapters.registry import Host
from biassurgery.adapters.scale import scale_of
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import (
    AlreadyPatched,
    BadOption,
    CalibrationRequired,
    UnsupportedModel,
    warn,
)
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.fields import real, words
from biassurgery.findings.finding import check_fits
from biassurgery.findings.sites import Sites
from biassurgery.measure.largest import largest_in_stream
from biassurgery.measure.rescale import Plan, adopted, norm_now, planned
from biassurgery.modes.base import Mode, Place
from biassurgery.modes.trial import packaged_batches, random_batches
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import edits_in
from biassurgery.surgery.rescale import CONFIG_KEY, RescaleEdit

FLOAT16 = torch.finfo(torch.float16).max
ROWS, TOKENS = 2, 64  # of the first batch, for the trial
ROOM = 2.0  # how many times the largest value of the data float16 is to hold
NOTED = 1e-4  # a difference of the outputs from which on it is said


class Saved(NamedTuple):
    """What a file says of a patch: see `Plan.norm`, and `adopted` for the rest."""

    norm: float
    norms: list[tuple[str, str]]
    key: str


@dataclass(frozen=True)
class Rescale(Mode):
    """What is written into the residual stream, and only that, times a factor, by weights alone.

    The model computes what it did, for its blocks read the stream through norms; only its hidden
    states are smaller, so that float16 holds them. `save_pretrained` writes a stock checkpoint.

    Attributes:
        factor: a power of two other than 1; `auto`: the mildest one that lets float16 hold twice
            the largest value of the data.
        diagnosis: what `diagnose` found, whose largest value is taken then.
        batches: of the model, on which the largest value is measured then, and of which the first
            shows that nothing else changes; None: packaged text or images, else random ids.
        plan: what was found and tried on the model, once it is on one.
        saved: what a file says of it, from which it was loaded.
    """

    name: ClassVar[str] = "rescale"
    needs_sites: ClassVar[bool] = False
    factor: float | Literal["auto"] = "auto"
    diagnosis: Diagnosis | None = field(default=None, compare=False, repr=False)
    batches: Batch | Iterable[Batch] | None = field(default=None, compare=False, repr=False)
    plan: Plan | None = field(default=None, init=False, compare=False, repr=False)
    saved: Saved | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.factor == "auto":
            return
        if (
            not isinstance(self.factor, Real)
            or isinstance(self.factor, bool)
            or not 0 < self.factor < math.inf
            or math.frexp(self.factor)[0] != 0.5
            or self.factor == 1
        ):
            raise BadOption(
                f"factor: {self.factor!r}; give 'auto', or a power of two other than 1, for example"
                " 0.25."
            )
        object.__setattr__(self, "factor", float(self.factor))  # numpy's floats cannot be saved

    def resolved(self, host: Host) -> Rescale:
        """The mode with its factor, and with what was found and tried on the model."""
        _check_rescalable(host)
        batches = self._data(host)
        trial = _part_of(batches[0])
        if self.saved is not None and self.factor != "auto":
            norm = norm_now(host, self.factor, trial)
            # What is multiplied already is nearer to what it was when it was saved.
            if abs(math.log2(norm / self.saved.norm)) < abs(math.log2(self.factor)) / 2:
                edit = adopted(host, self.factor, trial, self.saved.norms, self.saved.key)
                return self._with(self.factor, Plan(edit, 0.0, 0.0, {}, self.saved.norm))
        _check_unscaled(host)
        factor = self._measured(host, batches) if self.factor == "auto" else self.factor
        plan = planned(host, factor, trial)
        _say(host, plan)
        return self._with(factor, plan)

    def _data(self, host: Host) -> list[dict[str, Any]]:
        """What the factor is measured on, and of which the first is the trial."""
        batches = packaged_batches(host) if self.batches is None else self.batches
        if batches is None:
            if self.factor == "auto" and self.diagnosis is None:
                raise CalibrationRequired(
                    "factor: 'auto', but the packaged data cannot be used with this"
                    f" {type(host.root).__name__}, of which nothing says how its inputs are made;"
                    " give batches= or diagnosis=, or a factor."
                )
            batches = random_batches(host)
        return list(as_batches(host, batches))

    def _with(self, factor: float, plan: Plan) -> Rescale:
        mode = Rescale(factor)
        object.__setattr__(mode, "plan", plan)
        return mode

    def _measured(self, host: Host, batches: list[dict[str, Any]]) -> float:
        if self.diagnosis is not None:
            largest = _largest_of(host, self.diagnosis)
        else:
            largest = largest_in_stream(host, batches)
        factor = 2.0 ** math.floor(math.log2(FLOAT16 / ROOM / largest))
        if factor >= 1:
            raise BadOption(
                f"factor: 'auto', but the largest value of the residual stream is {largest:,.0f},"
                f" and float16 holds {FLOAT16:,.0f}, so that nothing needs to be smaller; give a"
                " factor if it is to be so all the same."
            )
        return factor

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        self.check_no_sites(sites)
        if layers not in (None, (), []):
            raise BadOption(
                f"layers: {layers!r}; the stream is one through all layers; leave layers= out."
            )
        assert self.plan is not None  # `resolved` comes first
        return [Place(None, host.root, self.plan.edit)]

    def options(self) -> dict[str, Any]:
        assert self.plan is not None  # of a patch that is on a model
        edit = self.plan.edit
        return {
            "factor": self.factor,
            "norm": self.plan.norm,
            "norms": [[setting.module, setting.name] for setting in edit.settings],
            "key": next((key for key in edit.config if key != CONFIG_KEY), ""),
        }

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Rescale:
        mode = cls(options["factor"])
        norms = [(words("norms", name), words("norms", at)) for name, at in options["norms"]]
        saved = Saved(real("norm", options["norm"], 0.0), norms, words("key", options["key"]))
        object.__setattr__(mode, "saved", saved)
        return mode


def _largest_of(host: Host, diagnosis: Any) -> float:
    """The largest value of the residual stream that a diagnosis of this model found."""
    if not isinstance(diagnosis, Diagnosis):
        raise BadOption(
            f"diagnosis: {type(diagnosis).__name__}; pass what diagnose(model, batches) returned."
        )
    origin = diagnosis.sites.origin
    measured_on = {name: getattr(origin, name) for name in host.facts}
    check_fits("diagnosis", measured_on, host.facts, "diagnose this one")
    return diagnosis.float16.largest / origin.factor  # of the model before it was rescaled


def _part_of(batch: dict[str, Any]) -> dict[str, Any]:
    """A few rows, and of text a few tokens where none of them is padding."""
    rows = {name: value[:ROWS] for name, value in batch.items()}
    return {"input_ids": rows["input_ids"][:, :TOKENS]} if [*rows] == ["input_ids"] else rows


def _check_rescalable(host: Host) -> None:
    """Refuse a model of which something else than the trial shows writes into the stream."""
    kind = type(host.root).__name__
    if isinstance(host.adapter, Half):
        raise UnsupportedModel(
            f"model: {kind} shares its weights with the other half of an encoder-decoder, whose"
            " residual stream they would change, too; rescale serves whole models."
        )
    if host.adapter.nested(host.model):
        raise UnsupportedModel(
            f"model: {kind} writes what it reads of images into the residual stream of its decoder,"
            " which a text does not show; rescale serves models of text, or of images, alone."
        )
    for _, edit in edits_in(host.root):
        if isinstance(edit, RescaleEdit) and edit.tower == host.tower:
            raise AlreadyPatched(
                "mode: rescale is on the model already; unpatch_model(model, 'rescale') first."
            )
        if isinstance(edit, BlockEdit) and edit.patch is not None:
            name = edit.patch.mode.name
            raise BadOption(
                f"mode: {name!r} is on the model, and what it writes is made for the stream as it"
                f" is; unpatch_model(model, {name!r}), rescale, then apply it again: sites are"
                " converted."
            )


def _check_unscaled(host: Host) -> None:
    factor = scale_of(host)
    if factor != 1:
        raise AlreadyPatched(
            f"mode: the config of this {type(host.root).__name__} says that it was rescaled by"
            f" {factor:g} before it was saved; load the original checkpoint for another factor."
        )


def _say(host: Host, plan: Plan) -> None:
    """Warn of what the trial shows that a user may not expect."""
    if plan.saved_error > NOTED:
        warn(
            f"rescale: of a saved checkpoint the output differs by {plan.saved_error:.1g} of its"
            " largest value: eps of norms that read the stream has to be scaled, too, and a"
            " checkpoint has no number for these norms alone. A factor nearer to 1 changes less.",
        )
    beyond = [name for name, peak in plan.peaks.items() if peak > FLOAT16]
    if beyond:
        warn(
            f"rescale: {', '.join(beyond[:3])} reaches {plan.peaks[beyond[0]]:,.0f} inside a"
            " branch, which float16 does not hold, and which a factor of the residual stream does"
            " not change; keep these modules in bfloat16 or float32.",
        )
