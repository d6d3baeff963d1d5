"""`KeyValues`: the mean key and value of a sequence's start token in every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.fields import whole, words
from biassurgery.findings.finding import (
    Finding,
    check_adds_up,
    check_finite,
    check_spread,
    check_tensors,
)
from biassurgery.ops.moments import merged_moments

_TENSORS = ("keys", "values", "key_std", "value_std")
_ADVICE = "calibrate_key_values(model, batches) again"


@dataclass(frozen=True, eq=False)
class KeyValues(Finding):
    """Mean key and value of the start token. `a + b` merges two measurements of one model.

    Attributes:
        keys: (layers, key-value heads, channels of a key) float32; with rotary positions, after the
            rotation.
        values: (layers, key-value heads, channels of a value) float32.
        key_std, value_std: of the same shapes, standard deviation over sequences; 0 where the start
            token is a constant.
        count: sequences.
        architecture: of the model that they were measured on.
        start: the id of the token that `start=` put in front of every sequence; None: it put none.

    Raises:
        BadOption: a mean and its deviation differ in shape, or a number is not finite.
    """

    file_key: ClassVar[str] = "biassurgery.key_values"
    what: ClassVar[str] = "key values"
    keys: Tensor
    values: Tensor
    key_std: Tensor
    value_std: Tensor
    count: int
    architecture: str
    start: int | None = None

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "count", whole("count", self.count))
        words("architecture", self.architecture)
        if self.start is not None:
            object.__setattr__(self, "start", whole("start", self.start))

    def check(self) -> None:
        check_tensors("key_values", self.tensors(), _ADVICE)
        for name, mean, std in (
            ("key", self.keys, self.key_std),
            ("value", self.values, self.value_std),
        ):
            if mean.dim() != 3 or std.shape != mean.shape:
                raise BadOption(
                    f"key_values: {name}s {tuple(mean.shape)} and {name}_std {tuple(std.shape)};"
                    " give both as (layers, key-value heads, channels)."
                )
        if self.keys.shape[:2] != self.values.shape[:2]:
            raise BadOption(
                f"key_values: keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
                " differ in layers or key-value heads; give both of one model."
            )
        check_finite("key_values", self.tensors(), _ADVICE)
        check_spread("key_values", {"key_std": self.key_std, "value_std": self.value_std})

    @property
    def measured_on(self) -> dict[str, Any]:
        """Facts of the model that they were measured on, for `check_fits`."""
        return key_value_facts(self.architecture, tuple(self.keys.shape), tuple(self.values.shape))

    @property
    def spread(self) -> float:
        """Largest std over root mean square of a layer's keys or values; 0: transplant is exact."""
        # In float64, for the square of a float32 may be infinite.
        pairs = (
            (self.keys.double(), self.key_std.double()),
            (self.values.double(), self.value_std.double()),
        )
        return max(
            (std.amax((1, 2)) / mean.square().mean((1, 2)).sqrt().clamp(min=1e-12)).max().item()
            for mean, std in pairs
        )

    @property
    def spread_by_layer(self) -> tuple[float, ...]:
        """How much the keys or values of each layer vary, whichever does more, over their size.

        Both as root mean squares over heads and channels; 0 where the start token is a constant. In
        layers before the one where it becomes massive, few queries attend to it, and a large spread
        costs little.
        """
        ratios = [
            (std.double().square().mean((1, 2)) / mean.double().square().mean((1, 2))).sqrt()
            for mean, std in ((self.keys, self.key_std), (self.values, self.value_std))
        ]
        return tuple(torch.stack(ratios).nan_to_num(0.0).amax(0).tolist())

    def __add__(self, other: KeyValues) -> KeyValues:
        """Both measurements as one.

        Raises:
            Incompatible: they are of different models.
        """
        if not isinstance(other, KeyValues):
            return NotImplemented
        advice = "add measurements of one model only"
        start = {"start": self.start}
        check_adds_up("key_values", start, {"start": other.start}, advice)
        check_adds_up("key_values", self.measured_on, other.measured_on, advice)
        keys, key_std = merged_moments(
            self.keys, other.keys, self.key_std, other.key_std, self.count, other.count
        )
        values, value_std = merged_moments(
            self.values, other.values, self.value_std, other.value_std, self.count, other.count
        )
        count = self.count + other.count
        return KeyValues(keys, values, key_std, value_std, count, self.architecture, self.start)

    def header(self) -> dict[str, Any]:
        header = {"count": self.count, "architecture": self.architecture}
        return header if self.start is None else header | {"start": self.start}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> KeyValues:
        table = {name: tensors[name] for name in _TENSORS}
        facts = {name: header[name] for name in ("count", "architecture")}
        return cls(**table, **facts, start=header.get("start"))


def key_value_facts(
    architecture: str, keys: tuple[int, ...], values: tuple[int, ...]
) -> dict[str, Any]:
    """What key values depend on: architecture, (layers, heads, channels) of keys and of values.

    The heads are key-value heads.
    """
    shape = "(layers, key-value heads, channels)"
    return {
        "architecture": architecture,
        f"shape of keys {shape}": keys,
        f"shape of values {shape}": values,
    }
