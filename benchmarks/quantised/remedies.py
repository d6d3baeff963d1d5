"""The columns of the table: what is done to a model before it is quantised."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.integrations.torchao_linears import Layers
from quantised.windows import Data

COLUMNS = (
    "as it is",
    "set_mean",
    "rescale",
    "pin",
    "ignore list",
    "SmoothQuant",
    "ignore list + SmoothQuant",
    "transplant",
    "transplant + SmoothQuant",
)
# Whose float32 is the same function, and not measured again.
CONTROL = {
    "ignore list": "as it is",
    "SmoothQuant": "as it is",
    "ignore list + SmoothQuant": "as it is",
    "transplant + SmoothQuant": "transplant",
}
STRENGTH = 0.5  # of SmoothQuant


class Known(NamedTuple):
    """What calibration data tell of the model as it is."""

    data: Data
    diagnosis: bs.Diagnosis
    key_values: bs.KeyValues

    @classmethod
    def of(cls, model: Any, data: Data) -> Known:
        found = bs.diagnose(model, data.calibration, progress=False)
        return cls(data, found, bs.calibrate_key_values(model, data.calibration, progress=False))


class Remedy(NamedTuple):
    """A column.

    Attributes:
        name: of the column.
        drop: tokens that leave the front of every window.
        ignore: names of linear layers that stay in floating point.
        smooth: strength of SmoothQuant; None: without.
    """

    name: str
    drop: int
    ignore: list[str]
    smooth: float | None

    @classmethod
    def of(cls, column: str, known: Known) -> Remedy:
        ignore = known.diagnosis.ignore() if "ignore list" in column else []
        smooth = STRENGTH if "SmoothQuant" in column else None
        return cls(column, int("transplant" in column), ignore, smooth)

    def on(self, model: Any, known: Known) -> AbstractContextManager[Any]:
        """The model with what is patched on it."""
        sites = known.diagnosis.sites
        if self.drop:
            return bs.patched(model, "transplant", key_values=known.key_values)
        if self.name == "set_mean":
            return bs.patched(model, "set_mean", sites=sites)
        if self.name == "rescale":
            return bs.patched(model, "rescale", factor=0.25)
        if self.name == "pin":
            starts = [site for site in sites if site.role == "start"]
            return bs.patched(model, "pin", sites=bs.Sites(starts, origin=sites.origin))
        return nullcontext()


def smoothing(model: Any, calibration: list[Tensor], strength: float) -> Mapping[str, Tensor]:
    """By name of a linear layer, what torchao's SmoothQuant multiplies its inputs by."""
    host = find_host(copy.deepcopy(model))
    layers = Layers.of(host, (), ())
    layers.smooth([{"input_ids": window} for window in calibration], strength)
    return layers.factors()
