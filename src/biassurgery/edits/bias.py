"""Explicit attention biases: what they add to the softmax, to its output, and to the state dict.

A kind is one class, known by being defined; the module of an attention gets its parameters as the
child `attention_bias_<kind>`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from biassurgery.errors import UnsupportedModel
from biassurgery.kinds import Kinds
from biassurgery.ops.columns import Columns
from biassurgery.ops.heads import cast
from biassurgery.ops.one_query import attend_one
from biassurgery.surgery.attention import Attention, AttentionEdit, Shape
from biassurgery.surgery.call import Call

NO_EFFECT = -1e4  # a logit whose share of any softmax is 0; float16 can hold it


@dataclass(frozen=True)
class Initial:
    """What new parameters begin as.

    Attributes:
        zero_effect: whether the model is to compute what it did.
        std: of the normal distribution that they are drawn from otherwise; of 0 nothing is drawn,
            so that the caller's random numbers stay what they were.
    """

    zero_effect: bool
    std: float

    def __call__(self, *size: int, silent: float = 0.0) -> Parameter:
        """A parameter of a size: filled with `silent` under zero effect, normal otherwise."""
        return Parameter(torch.full(size, silent)) if self.zero_effect else self.normal(*size)

    def normal(self, *size: int) -> Parameter:
        """A normal parameter in any case, for what another one keeps without effect."""
        drawn = torch.randn(size) * self.std if self.std else torch.zeros(size)
        return Parameter(drawn)


class Bias(AttentionEdit):
    """Base of the explicit biases. A subclass that sets `kind` can be asked for by it:

        class OutputScale(Bias):
            kind = "output_scale"

            def build(self, shape, initial):
                self.scale = initial(shape.heads)

            def change(self, call, out, attention_input):
                return out * (1 + self.scale[:, None, None]).to(out.dtype)

    Beside `build` a kind has `columns`, `change` or both, see `AttentionEdit`.

    Attributes:
        kind: what `attention_bias` knows it by; a base class has none.
        has_parameters: whether there is anything to begin with, to train, and to be silent by.
        has_key_values: whether its parameters `k_bias`, `v_bias` can begin as `KeyValues`.
        learns_from_zero_effect: whether `init="zero_effect"` leaves its parameters a gradient.
        reads_input: whether `change` gets what the attention reads (B, T, D), else None.
    """

    kind: ClassVar[str]
    has_parameters: ClassVar[bool] = True
    has_key_values: ClassVar[bool] = False
    learns_from_zero_effect: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        BIASES.add(cls)

    def __init__(self, attention: Attention, initial: Initial) -> None:
        super().__init__()
        self.child = f"attention_bias_{self.kind}"
        self.route = attention.route
        if self.reads_input:
            self.route.check_input()
        self.build(attention.shape, initial)

    @abstractmethod
    def build(self, shape: Shape, initial: Initial) -> None:
        """Make the parameters of one attention, in float32."""

    def fill(self, key: Tensor, value: Tensor) -> None:
        """Begin as a key (kv_heads, d) and a value (kv_heads, dv), as far as there is either."""
        with torch.no_grad():
            for name, start in (("k_bias", key), ("v_bias", value)):
                if name in self._parameters:
                    getattr(self, name).copy_(start)


BIASES: Kinds[Bias] = Kinds("kind", "kind")


class KeyBias(Bias):
    """One key k' more in every head, neither rotated nor masked, whose value is 0 (Gu et al. 2025).

    Attributes:
        logit: (H, 1) buffer, added to the logits of the column; 0 in equation 3 of Sun et al. 2024.
    """

    kind = "k"
    reads_call = False
    has_key_values = True
    learns_from_zero_effect = False
    logit: Tensor

    def build(self, shape: Shape, initial: Initial) -> None:
        self.k_bias = initial.normal(shape.kv_heads, shape.key)
        silent = NO_EFFECT if initial.zero_effect else 0.0
        self.register_buffer("logit", torch.full((shape.heads, 1), silent))

    def columns(self, call: Call) -> Columns:
        # (H, 1, 1), to be broadcast to (B, H, T, 1)
        key = cast(self.k_bias, call.q.dtype).unsqueeze(1)
        return Columns(self.logit.unsqueeze(-1), key, None)


class KeyValueBias(KeyBias):
    """One key k' and value v' more in every head: softmax([q K^T, q k'] * scale) [V; v'].

    Source: Sun et al. 2024, equation 3.
    """

    kind = "kv"

    def build(self, shape: Shape, initial: Initial) -> None:
        super().build(shape, initial)
        self.v_bias = initial.normal(shape.kv_heads, shape.value)

    def columns(self, call: Call) -> Columns:
        logit, key, _ = super().columns(call)
        return Columns(logit, key, cast(self.v_bias, call.v.dtype).unsqueeze(1))

    def one_query(self, call: Call) -> Tensor | None:
        # Past nn.Module's own look-up, which each layer would wait for at each step.
        own = self._parameters
        logit, key, value = self._buffers["logit"], own["k_bias"], own["v_bias"]
        assert logit is not None
        assert key is not None
        assert value is not None
        return attend_one(call.q, call.k, call.v, logit, key, value, call.scale)


class ValueBias(Bias):
    """A value v' added to what each head returns (Gu et al. 2025)."""

    kind = "v"
    reads_call = False
    has_key_values = True

    def build(self, shape: Shape, initial: Initial) -> None:
        self.v_bias = initial(shape.kv_heads, shape.value)

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        groups = out.shape[1] // len(self.v_bias)
        return out + self.v_bias.repeat_interleave(groups, 0)[:, None].to(out.dtype)


class SinkLogit(Bias):
    """A learned logit in every head whose value is 0 (gpt-oss)."""

    kind = "sink_logit"
    reads_call = False
    learns_from_zero_effect = False

    def build(self, shape: Shape, initial: Initial) -> None:
        self.sink_logit = initial(shape.heads, silent=NO_EFFECT)

    def columns(self, call: Call) -> Columns:
        return Columns(self.sink_logit.view(-1, 1, 1), None, None)


class OffByOne(Bias):
    """A column whose logit and value are 0, so that a head can attend to nothing (softmax1)."""

    kind = "off_by_one"
    reads_call = False
    has_parameters = False
    logit: Tensor

    def build(self, shape: Shape, initial: Initial) -> None:
        self.register_buffer("logit", torch.zeros(shape.heads, 1))

    def columns(self, call: Call) -> Columns:
        return Columns(self.logit.unsqueeze(-1), None, None)


class Gate(Bias):
    """Head outputs times 2 sigmoid(gate . x), x what the attention reads, head by head.

    The factor makes the gate 1 where its weights are 0; the output projection of a gated attention
    trained without it is half as large. Source: Qiu et al. 2025.
    """

    kind = "gate"
    reads_call = False
    reads_input = True

    def build(self, shape: Shape, initial: Initial) -> None:
        self.gate = initial(shape.heads, shape.width)

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        assert attention_input is not None  # for this edit reads it
        if attention_input.shape[-1] != self.gate.shape[1]:
            raise UnsupportedModel(
                f"model: an attention read {attention_input.shape[-1]} channels where its adapter"
                f" says {self.gate.shape[1]}; unpatch the model and register an adapter with"
                " attention()."
            )
        logits = nn.functional.linear(attention_input, self.gate.to(attention_input.dtype))
        opening = 2 * logits.sigmoid()  # (B, T, H)
        return out * opening.transpose(1, 2)[..., None].to(out.dtype)
