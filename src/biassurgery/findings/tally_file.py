"""A `Tally` as the tensors of a file, and back, of which nothing is taken for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.fields import whole
from biassurgery.findings.finding import check_finite
from biassurgery.findings.tally import Tally

_NAMES = (*Tally.ROWS, "below", "medians")
_GROWTH = ("grown", "growth")  # unknown to earlier versions
_ADVICE = "calibrate(model, batches) again"


def tensors_of(tally: Tally) -> dict[str, Tensor]:
    values = {name: getattr(tally, name) for name in (*_NAMES, *_GROWTH)}
    return {name: value for name, value in values.items() if value is not None}


def tally_of(header: dict[str, Any], tensors: dict[str, Tensor], roles: int) -> Tally:
    """The tally of a file.

    Args:
        header: with `sequences`, `tokens` and the origin.
        tensors: among them those of a tally.
        roles: how many it counts.

    Raises:
        BadOption, KeyError: they are not those of a tally: they would be added up.
    """
    names = (*_NAMES, *_GROWTH) if "grown" in tensors else _NAMES
    rows = {name: tensors[name] for name in names}
    check_finite("tally", rows | {"hit": rows["hit"].nan_to_num(torch.nan, 0.0)}, _ADVICE)
    _check_shapes(rows)
    tally = Tally(
        **rows,
        sequences=whole("sequences", header["sequences"]),
        tokens=whole("tokens", header["tokens"]),
        starts=tuple(header["origin"].get("starts", ())) or None,
    )
    _check_rows(tally, roles)
    return tally


def _check_shapes(tally: dict[str, Tensor]) -> None:
    rows = tally["keys"].shape[:1]
    layers = tally["below"].shape[:1]
    shapes = dict.fromkeys(Tally.ROWS, rows) | {"medians": layers}
    if "grown" in tally:
        shapes |= dict.fromkeys(_GROWTH, tally["grown"].shape[:1])
    dtypes = dict.fromkeys(tally, torch.float64)
    dtypes |= {"keys": torch.int64, "grown": torch.int64, "below": torch.float32}
    wrong = [name for name, shape in shapes.items() if tally[name].shape != shape]
    wrong += [name for name, tensor in tally.items() if tensor.dtype != dtypes[name]]
    if wrong or tally["below"].dim() != 2:
        names = dict.fromkeys(("keys", "below", *wrong))
        given = {name: (tuple(tally[name].shape), tally[name].dtype) for name in names}
        raise BadOption(f"tally: tensors do not go together, {given}; {_ADVICE}.")


def _check_rows(tally: Tally, roles: int) -> None:
    """Every row is of a channel and role that there are, and of values that can be."""
    last = torch.tensor([tally.width - 1, roles - 1], device="cpu")
    most_negative = torch.tensor(-1e308, dtype=torch.float64, device="cpu")
    largest = tally.key(tally.layers - 1, last[0], last[1], roles, most_negative)
    right = (tally.keys >= 0) & (tally.keys <= largest) & (tally.count >= 1)
    right &= (tally.deviation >= 0) & (tally.low >= 0) & (tally.low <= tally.high)
    right &= tally.hit >= tally.low
    if tally.grown is not None and tally.growth is not None:
        triples = tally.width * tally.layers**2
        grown = (tally.grown >= 0) & (tally.grown < triples) & (tally.growth >= 0)
        right = torch.cat([right, grown])
    if not bool(right.all()) or bool((tally.below < 0).any() | (tally.medians < 0).any()):
        raise BadOption(
            f"tally: it has rows that no calibration of {roles} roles gives; {_ADVICE}."
        )
