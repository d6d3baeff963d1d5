"""Explicit attention biases: what they add to the softmax, to its output, and to the state dict.

kv: softmax([q K^T, q k'] * scale) [V; v'] (Sun et al. 2024, equation 3); k: the same with v' = 0;
    v: v' is added to what a head returns
(both Gu et al. 2025); sink_logit: a learned logit whose value is 0 (gpt-oss); off_by_one: the logit
is 0 (softmax1); gate: what a head returns times a sigmoid of what the attention reads (Qiu et al.
2025).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import AttentionEdit, EditedAttention, Shape
from biassurgery.surgery.call import Call

NO_EFFECT = -1e4  # a logit whose share of any softmax is 0; float16 can hold it


Make = Callable[..., Tensor]  # a shape -> the initial values


class BiasEdit(AttentionEdit):
    """Base of the explicit biases.

    Attributes:
        logit: (H, 1) buffer, added to the logits of the column; 0 in equation 3.
    """

    logit: Tensor

    def __init__(self, child: str, route: type[EditedAttention]) -> None:
        super().__init__()
        self.child = child
        self.route = route

    def logits(self) -> Tensor:
        """(H, 1, 1), to be broadcast to (B, H, T, 1)."""
        return self.logit[:, :, None]


class KeyValueBias(BiasEdit):
    """One key k' and value v' more in every head: kinds kv and k, and `transplant`."""

    def __init__(
        self,
        child: str,
        route: type[EditedAttention],
        shape: Shape,
        make: Make,
        silent: bool,
        with_value: bool = True,
    ) -> None:
        super().__init__(child, route)
        self.k_bias = Parameter(make(shape.kv_heads, shape.key))
        self.v_bias = Parameter(make(shape.kv_heads, shape.value)) if with_value else None
        self.register_buffer("logit", torch.full((shape.heads, 1), NO_EFFECT if silent else 0.0))

    def columns(self, call: Call) -> Columns:
        value = None if self.v_bias is None else self.v_bias[:, None].to(call.v.dtype)
        return Columns(self.logits(), self.k_bias[:, None].to(call.q.dtype), value)


class ValueBias(BiasEdit):
    """v' added to what each head returns: kind v."""

    def __init__(
        self, child: str, route: type[EditedAttention], shape: Shape, make: Make, silent: bool
    ) -> None:
        super().__init__(child, route)
        self.v_bias = Parameter(
            torch.zeros(shape.kv_heads, shape.value)
            if silent
            else make(shape.kv_heads, shape.value)
        )

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        return out + self.v_bias.repeat_interleave(out.shape[1] // len(self.v_bias), 0)[:, None].to(
            out.dtype
        )


class SinkLogit(BiasEdit):
    """A logit of its own in every head whose value is 0: kind sink_logit."""

    def __init__(
        self, child: str, route: type[EditedAttention], shape: Shape, make: Make, silent: bool
    ) -> None:
        super().__init__(child, route)
        self.sink_logit = Parameter(
            torch.full((shape.heads,), NO_EFFECT) if silent else make(shape.heads)
        )

    def logits(self) -> Tensor:
        return self.sink_logit[:, None, None]

    def columns(self, call: Call) -> Columns:
        return Columns(self.logits(), None, None)


class OffByOne(BiasEdit):
    """A column whose logit and value are 0, so that a head can attend to nothing: kind
    off_by_one.
    """

    def __init__(self, child: str, route: type[EditedAttention], shape: Shape) -> None:
        super().__init__(child, route)
        self.register_buffer("logit", torch.zeros(shape.heads, 1))

    def columns(self, call: Call) -> Columns:
        return Columns(self.logits(), None, None)


class Gate(BiasEdit):
    """Head outputs times 2 sigmoid(gate . x), x what the attention reads: kind gate, head by head.

    The factor makes the gate 1 where its weights are 0; the output projection of a gated attention
    trained without it is half as large.
    """

    reads_input = True

    def __init__(
        self, child: str, route: type[EditedAttention], shape: Shape, make: Make, silent: bool
    ) -> None:
        route.check_input()
        super().__init__(child, route)
        self.gate = Parameter(
            torch.zeros(shape.heads, shape.width) if silent else make(shape.heads, shape.width)
        )

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        assert attention_input is not None  # for this edit reads it
        if attention_input.shape[-1] != self.gate.shape[1]:
            raise UnsupportedModel(
                f"model: an attention read {attention_input.shape[-1]} channels where its adapter"
                f" says {self.gate.shape[1]}; unpatch the model and register an adapter with"
                " attention()."
            )
        opening = (
            2 * nn.functional.linear(attention_input, self.gate.to(attention_input.dtype)).sigmoid()
        )
        return out * opening.transpose(1, 2)[..., None].to(out.dtype)
