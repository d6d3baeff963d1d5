"""Keys and values of start tokens, added up as batches are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.sums import Sums
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.start_tokens import alone, starts_of
from biassurgery.measure.together import in_step
from biassurgery.measure.token_positions import count_edits
from biassurgery.ops.columns import Columns
from biassurgery.ops.moments import moments
from biassurgery.surgery.attention import AttentionEdit, EditedAttention, Shape
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place, attached


class _StartEdit(AttentionEdit):
    """Adds up the keys and values at the start tokens of every batch, (Hkv, d) float64 each.

    Attributes:
        starts: (N, 2) int64, row and position of the start tokens of the batch at hand.
        sums: of keys and values, and of their squares, by (layer, name).
    """

    child = "start_of_sequence"

    def __init__(self, layer: int, route: type[EditedAttention], sums: Sums) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.starts = torch.empty(0, 2, dtype=torch.int64)
        self.sums = sums

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        row, token = self.starts.to(call.k.device).unbind(1)
        for name, tensor in (("keys", call.k), ("values", call.v)):
            at_start = tensor[row, :, token].double().cpu()  # (N, Hkv, d)
            sums = torch.stack([at_start.sum(0), at_start.square().sum(0)])
            self.sums.add((self.layer, name), sums)


class Measuring:
    """Reads the start tokens of batches, by themselves where that is the same.

    Attributes:
        sums: of keys and values by layer, and how many `starts` there were.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sums = Sums()
        self.attending = attentions(host, range(len(host.blocks)))
        self.edits = {
            layer: _StartEdit(layer, attention.route, self.sums)
            for layer, attention in self.attending.items()
        }

    def places(self) -> list[Place]:
        places = [self.attending[layer].place(layer, edit) for layer, edit in self.edits.items()]
        return places + count_edits(self.host)  # starts stand where they do without padding

    def read(
        self, batches: Iterable[dict[str, Any]], progress: bool | None, total: int | None = None
    ) -> None:
        """Run the model on every batch."""
        with reading(self.host.model), attached(self.places()):
            for batch in with_bar(in_step(batches, self.host.root), "calibrating", progress, total):
                self.host.adapter.run(self.host.model, self.begin(batch))
                self.end()

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch is about to be read; what the model reads of it."""
        starts = starts_of(self.host, batch)
        by_itself = alone(self.host, batch, starts)
        self._count = len(starts)
        for edit in self.edits.values():
            edit.starts = starts if by_itself is None else by_itself.places
        return batch if by_itself is None else by_itself.batch

    def end(self) -> None:
        self.sums.add("starts", self._count)

    def suspend(self) -> None:
        """Nothing is known of a batch that the sums do not hold."""

    def resume(self, known: None) -> None:
        """Nothing has to be told."""

    def state(self) -> Any:
        return self.sums.state()

    def restore(self, state: Any) -> None:
        self.sums.restore(state)

    def result(self) -> KeyValues:
        count = self.sums.get("starts", 0)
        if not count:
            raise BadBatch(
                "batches: there is no real token in them; give sequences that are not all padding."
            )
        for layer, attention in self.attending.items():
            _check_sums(self.host, layer, attention.shape, self.sums)
        keys, key_std = self._moments("keys", count)
        values, value_std = self._moments("values", count)
        return KeyValues(keys, values, key_std, value_std, count, self.host.architecture)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value (Hkv, d) of one layer, float32, where one batch has been read as far."""
        _check_sums(self.host, layer, self.attending[layer].shape, self.sums)
        key, value = (self.sums[layer, name][0] / self._count for name in ("keys", "values"))
        return key.float(), value.float()

    def _moments(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        return _moments(self.host, [self.sums[layer, name] for layer in self.attending], count)


def of_one(host: Host, batch: dict[str, Any]) -> KeyValues:
    """Those of one batch."""
    measuring = Measuring(host)
    measuring.read([batch], progress=False)
    return measuring.result()


def _check_sums(host: Host, layer: int, shape: Shape, sums: Sums) -> None:
    """Refuse an attention that did not run, or whose heads are not what the adapter says."""
    if (layer, "keys") not in sums:
        raise UnsupportedModel(
            f"model: the attention of block {layer} did not run; its key and value are not known."
        )
    sizes = {name: tuple(sums[layer, name].shape[1:]) for name in ("keys", "values")}
    if sizes != {"keys": (shape.kv_heads, shape.key), "values": (shape.kv_heads, shape.value)}:
        raise UnsupportedModel(
            f"model: the attention of {type(host.model).__name__} reads {sizes}, where {shape}"
            " was expected; register an adapter with attention()."
        )


def _moments(host: Host, sums: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (layers, Hkv, d), float32, from (2, Hkv, d) of every layer."""
    if len({of_layer.shape for of_layer in sums}) > 1:
        raise UnsupportedModel(
            "model: its layers have heads of different shapes,"
            f" {[tuple(of_layer.shape[1:]) for of_layer in sums]}; key values of such a model"
            " cannot be held in one table."
        )
    total, squares = torch.stack(sums, 1)
    mean, std = moments(total, squares, count)
    if not mean.isfinite().all():
        raise NonFiniteActivation(
            f"batches: the keys or values of the start token hold NaN or infinity;"
            f" {what_to_do(host)}."
        )
    return mean, std
