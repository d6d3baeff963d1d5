"""The rows of the table: how weights and activations are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from biassurgery.adapters.linears import linears
from biassurgery.adapters.registry import find_host
from biassurgery.evaluate.quantised import fake_quantised
from biassurgery.integrations.torchao import QUANTILES, quantize_static
from biassurgery.measure.linear_quantiles import LinearQuantiles
from quantised.remedies import COLUMNS, Known, Remedy, smoothing

GROUP = 64  # inputs that share a scale, of weights at few bits
_STATIC = tuple(column for column in COLUMNS if column != "rescale")
_PATCHES = ("as it is", "set_mean", "pin", "ignore list", "transplant")


class Row(NamedTuple):
    """A row: for which columns it is measured, and whether it depends on calibration data."""

    columns: tuple[str, ...]
    calibrated: bool = False


ROWS = {
    "float32": Row(("as it is", "set_mean", "rescale", "pin", "transplant")),
    "weights int8": Row(_PATCHES),
    "static, largest": Row(COLUMNS, calibrated=True),
    "static, quantile": Row(_STATIC, calibrated=True),
    "static, ordinary": Row(("as it is", "set_mean", "pin", "ignore list"), calibrated=True),
    "static, down_proj per token": Row(("as it is", "ignore list", "transplant"), calibrated=True),
    "dynamic per tensor": Row(_PATCHES),
    "dynamic per token": Row(_PATCHES),
    "torchao static": Row(_STATIC, calibrated=True),
    "weights int4": Row(("as it is", "pin", "transplant")),
    "weights int3": Row(("as it is", "pin", "transplant")),
}


class Rounded(NamedTuple):
    """A quantisation: the context in which the model is under it, and the quantile it chose."""

    context: AbstractContextManager[Any]
    quantile: float | None = None


Losses = Callable[[list[Tensor]], list[float]]


def rounded(model: Any, known: Known, row: str, remedy: Remedy, losses: Losses) -> Rounded:
    """The quantisation of a row; that of `torchao` has changed the model for good."""
    ignore = remedy.ignore
    if row == "float32":
        return Rounded(nullcontext())
    calibration, held = ([w[:, remedy.drop :] for w in part] for part in known.data[:2])
    if row == "torchao static":
        # There the fourth and the eighth of eight batches choose the quantile.
        eight = [*calibration, *held]
        made = quantize_static(model, eight, ignore=ignore, smooth=remedy.smooth, progress=False)
        return Rounded(nullcontext(), made.quantile)
    if row == "weights int8":
        return Rounded(fake_quantised(model, "exact", ignore=ignore))
    if row.startswith("weights"):
        bits = int(row[-1])
        return Rounded(fake_quantised(model, "exact", bits=bits, group=GROUP, ignore=ignore))
    if row.startswith("dynamic"):
        return Rounded(fake_quantised(model, _scaled(row), ignore=ignore))
    return _static(model, known, row, remedy, calibration, lambda: losses(known.data.held))


def _scaled(row: str) -> Any:
    return "token" if row.endswith("token") else "tensor"


def _static(
    model: Any,
    known: Known,
    row: str,
    remedy: Remedy,
    calibration: list[Tensor],
    losses: Callable[[], list[float]],
) -> Rounded:
    """Scales that reach to the largest magnitude, to the quantile that the losses choose, or to the
    largest at ordinary tokens, so that massive ones clip.
    """
    factors: Mapping[str, Tensor] = {}
    if remedy.smooth is not None:
        factors = smoothing(model, calibration, remedy.smooth)

    def under(largest: Mapping[str, float], per_token: list[str]) -> AbstractContextManager[Any]:
        return fake_quantised(
            model,
            "static",
            largest=largest,
            ignore=remedy.ignore,
            per_token=per_token,
            factors=factors,
        )

    if row == "static, ordinary":
        ordinary = {linear.name: linear.ordinary for linear in known.diagnosis.linears}
        return Rounded(under(ordinary, []))
    host = find_host(model)
    every = linears(host)
    seen = LinearQuantiles(host, every, factors)
    seen.read([{"input_ids": window} for window in calibration], "scales", progress=False)
    if row == "static, quantile":

        def cost(share: float) -> float:
            with under(seen.quantile(share), []):
                return sum(losses())

        best = min(QUANTILES, key=cost)
        return Rounded(under(seen.quantile(best), []), best)
    per_token = [each.name for each in every if each.name.endswith("down_proj")]
    return Rounded(under(seen.quantile(1.0), per_token if "per token" in row else []), 1.0)
