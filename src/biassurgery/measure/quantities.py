"""What `record` can record: one class a quantity, ours and other packages'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from biassurgery.kinds import Kinds
from biassurgery.measure.seen import SeenAttention
from biassurgery.ops.decompose import value_updates
from biassurgery.surgery.shares import keys_at

QUANTITIES: Kinds[Quantity] = Kinds("what", "name")


class Quantity(ABC):
    """Base of the two kinds of quantities; a subclass that sets `name` can be recorded by it.

    Attributes:
        name: as `record(model, what=(name,))` takes it.
        reused: whether `of` returns a tensor that the model may write to later, so that it has to
            be copied.
    """

    name: ClassVar[str]
    reused: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        QUANTITIES.add(cls)


class BlockQuantity(Quantity):
    """Something about the residual stream at one end of a block, patches included.

    Attributes:
        at: which end.
    """

    at: ClassVar[Literal["input", "output"]] = "output"
    reused = True

    @abstractmethod
    def of(self, hidden: Tensor) -> Tensor:
        """The quantity, given the residual stream (B, T, D)."""


class AttentionQuantity(Quantity):
    """Something about one attention.

    Attributes:
        at: when it is computed: when the heads have returned, or when the attention module has, so
            that `seen.attention_input` and `seen.output` are known.
    """

    at: ClassVar[Literal["heads", "module"]] = "heads"

    @abstractmethod
    def of(self, seen: SeenAttention) -> Tensor:
        """The quantity, given the attention; what it does not read is not computed."""


class StreamBefore(BlockQuantity):
    """(B, T, D): the residual stream that a block works on."""

    name = "block_input"
    at = "input"

    def of(self, hidden: Tensor) -> Tensor:
        return hidden


class StreamBehind(BlockQuantity):
    """(B, T, D): the residual stream behind a block."""

    name = "block_output"

    def of(self, hidden: Tensor) -> Tensor:
        return hidden


class NormOutput(AttentionQuantity):
    """(B, T, D): what the attention reads."""

    name = "norm_output"
    at = "module"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.attention_input


class AttentionOutput(AttentionQuantity):
    """(B, T, D): what the attention returns, after its projection."""

    name = "attention_output"
    at = "module"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.output


class Queries(AttentionQuantity):
    """(B, H, T, d): queries, positions applied."""

    name = "q"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.call.q


class Keys(AttentionQuantity):
    """(B, Hkv, S, d): keys, positions applied, cached ones included."""

    name = "k"
    reused = True

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.call.k


class Values(AttentionQuantity):
    """(B, Hkv, S, dv): values, cached ones included."""

    name = "v"
    reused = True

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.call.v


class Logits(AttentionQuantity):
    """(B, H, T, S) float32: scaled, -inf where a query does not look."""

    name = "logits"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.logits


class Probs(AttentionQuantity):
    """(B, H, T, S) float32: the attention."""

    name = "probs"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.probs


class SinkMass(AttentionQuantity):
    """(B, H, T) float32: the share of each query's attention on the sinks."""

    name = "sink_mass"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.sink_shares.sum(-1)


class BiasMass(AttentionQuantity):
    """(B, H, T) float32: the share that explicit biases take."""

    name = "bias_mass"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.bias_mass


class LogSumExp(AttentionQuantity):
    """(B, H, T) float32: log-sum-exp of each query's logits, explicit biases included."""

    name = "lse"

    def of(self, seen: SeenAttention) -> Tensor:
        return seen.lse


class ValueUpdates(AttentionQuantity):
    """(2, B, H, T, dv): heads' output from the sinks, and the rest (Sun et al. 2024, section 4)."""

    name = "value_updates"

    def of(self, seen: SeenAttention) -> Tensor:
        # A sink that has left the cache has share 0, so that any key may stand for it.
        keys = seen.sink_keys.clamp(0, seen.call.k.shape[2] - 1)
        from_sinks = value_updates(seen.sink_shares, keys_at(seen.call.v, keys)).to(seen.out.dtype)
        return torch.stack([from_sinks, seen.out - from_sinks])
