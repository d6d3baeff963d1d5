"""Quantiles of the magnitudes that linear layers read, in one pass and constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.linears import Linear
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadBatch, NonFiniteActivation
from biassurgery.measure.reading import reading, with_bar
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.linear import InputEdit

_PER_OCTAVE = 32  # bins: a quantile is at most 2.2 % too high
_LOWEST = -24  # octaves; what is smaller counts as zero
_OCTAVES = 64


class _Histogram(InputEdit):
    """Counts the magnitudes of what a linear layer reads (..., D) in bins on a log scale.

    Args:
        factors: (D,) by which the channels are multiplied first; None: 1.

    Attributes:
        real: (B * T,) bool, of the batch at hand; None: there is no padding.
        axes: of what was read.
        misfit: whether it has read other tokens than those of the batch, as an expert does, of
            which it is not known which are padding.
    """

    def __init__(self, factors: Tensor | None) -> None:
        super().__init__()
        self.factors = factors
        self.counts: Tensor | None = None
        self.largest = 0.0
        self.axes = 0
        self.real: Tensor | None = None
        self.misfit = False

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach() if self.factors is None else x.detach() * self.factors
        self.axes = x.dim()
        if self.real is not None:
            self.misfit = self.misfit or len(self.real) * x.shape[-1] != x.numel()
            if self.misfit:
                return x
            values = values.flatten(0, -2)[self.real.to(x.device)]
        magnitude = values.abs().float().flatten()
        self.largest = max(self.largest, magnitude.max().item() if len(magnitude) else 0.0)
        bins = (magnitude.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _PER_OCTAVE
        counts = (
            bins.long()
            .clamp(max=_OCTAVES * _PER_OCTAVE - 1)
            .bincount(minlength=_OCTAVES * _PER_OCTAVE)
        )
        self.counts = counts if self.counts is None else self.counts + counts
        return x

    def quantile(self, share: float) -> float:
        """The magnitude that a share of all values does not pass, or the upper end of its bin."""
        if share >= 1 or self.counts is None:
            return self.largest
        reached = self.counts.cumsum(0).double() / self.counts.sum()
        index = int((reached < share).sum())
        return min(self.largest, 2.0 ** ((index + 1) / _PER_OCTAVE + _LOWEST))


class LinearQuantiles:
    """Quantiles of what each linear layer has read.

    Args:
        host: the model.
        linears: of it.
        factors: by name (D,), by which a layer multiplies what it reads before it is rounded.
    """

    def __init__(
        self, host: Host, linears: Iterable[Linear], factors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.host = host
        self.linears = list(linears)
        scaled = factors or {}
        self.edits = [_Histogram(scaled.get(each.name)) for each in self.linears]

    def read(
        self, batches: Sequence[dict[str, Any]], name: str, progress: bool | None = None
    ) -> None:
        """Run the blocks on checked batches; padding is left out.

        Raises:
            NonFiniteActivation: a layer has read NaN or infinity.
            BadBatch: of what a layer reads it is not known what is padding.
        """
        host = self.host
        places = [
            Place(each.layer, each.module, edit) for each, edit in zip(self.linears, self.edits)
        ]
        with reading(host.model), attached(places):
            for batch in with_bar(batches, name, progress):
                real = self._real(batch)
                for edit in self.edits:
                    edit.real = real
                host.adapter.run(host.model, batch)
                self._check_padding()
        for each, edit in zip(self.linears, self.edits):
            if not edit.largest < torch.inf:
                raise NonFiniteActivation(
                    f"batches: what {each.name} reads holds NaN or infinity; {what_to_do(host)}."
                )

    def _check_padding(self) -> None:
        for each, edit in zip(self.linears, self.edits):
            if edit.misfit:
                raise BadBatch(
                    f"batches: rows have padding, and {each.name} reads some tokens only, of which"
                    " it is not known which are padding; give rows without, or ignore it."
                )

    def _real(self, batch: Mapping[str, Any]) -> Tensor | None:
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return None
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        assert ids is not None  # text has masks
        roles = self.host.adapter.token_roles(self.host.model, batch, tuple(ids.shape[:2]))
        return (roles != PADDING).flatten()

    def quantile(self, share: float) -> dict[str, float]:
        """By name of the layers that ran, the magnitude that `share` of all values do not pass."""
        return {
            each.name: edit.quantile(share)
            for each, edit in zip(self.linears, self.edits)
            if edit.counts is not None
        }

    def axes(self) -> dict[str, int]:
        """By name of the layers that ran, how many axes what they read has."""
        return {
            each.name: edit.axes
            for each, edit in zip(self.linears, self.edits)
            if edit.counts is not None
        }
