"""What a `Diagnosis` consists of: linear layers, weights, float16, sinks, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biassurgery.errors import BadOption
from biassurgery.findings.fields import items, real, whole, words

FLOAT16 = 65504.0  # its largest number
HEAD_ROOM = 2.0  # so many times may a value of other data be larger
CONFIRMED = 0.1  # nats a token that a loss must rise by, for a weight to be a super weight


@dataclass(frozen=True)
class Token:
    """A token: its role, its place in its sequence from 0 and, in text, its id and what it says."""

    role: str
    position: int
    id: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        name = "" if self.text is None else f" {self.text!r}"
        return f"{self.role}{name} at {self.position}"

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Token:
        id_ = None if saved["id"] is None else whole("id", saved["id"])
        text = None if saved["text"] is None else words("text", saved["text"])
        return cls(words("role", saved["role"]), whole("position", saved["position"]), id_, text)


@dataclass(frozen=True)
class LinearRange:
    """The largest magnitudes that one linear layer reads and returns, over all data.

    Attributes:
        name: as in `model.named_modules()`.
        layer: the block that it is in.
        largest: of what it reads.
        ordinary: the same over tokens that carry no massive activation at any block.
        token: whose the largest is.
        kinds: the same by kind of token: `ordinary`, and each role of those that carry some.
        returned: the largest of what it returns.
    """

    name: str
    layer: int
    largest: float
    ordinary: float
    token: Token
    kinds: Mapping[str, float]
    returned: float

    @property
    def ratio(self) -> float:
        """How many times coarser a scale for all tokens is than one for ordinary ones."""
        if not self.ordinary:
            return math.inf if self.largest else 1.0
        return self.largest / self.ordinary

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> LinearRange:
        kinds = {words("kind", name): real(name, at, 0.0) for name, at in saved["kinds"].items()}
        numbers = {name: real(name, saved[name], 0.0) for name in ("largest", "ordinary")}
        return cls(
            words("name", saved["name"]),
            whole("layer", saved["layer"]),
            **numbers,
            token=Token.from_json(saved["token"]),
            kinds=kinds,
            returned=real("returned", saved["returned"], 0.0),
        )


@dataclass(frozen=True)
class SuperWeight:
    """One weight that writes much of a massive activation (Yu et al. 2024, "The Super Weight").

    Attributes:
        name: of its matrix, as in `model.named_modules()`.
        layer: the block that it is in.
        row, column: the output and the input that it joins; for `nn.Linear` its place in `weight`.
        value: the weight.
        contribution: what it writes into the residual stream at the token with the largest value.
        share: of what its matrix writes there.
        loss: how much the mean loss of the short text rises, in nats a token, with it taken to be
            zero; None: not measured.
    """

    name: str
    layer: int
    row: int
    column: int
    value: float
    contribution: float
    share: float
    loss: float | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the model needs it: without it the loss rises by more than 0.1 nats a token."""
        return self.loss is not None and self.loss > CONFIRMED

    @property
    def place(self) -> str:
        """As it is written in Python."""
        return f"{self.name}[{self.row}, {self.column}]"

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SuperWeight:
        return cls(
            words("name", saved["name"]),
            *(whole(name, saved[name]) for name in ("layer", "row", "column")),
            *(real(name, saved[name]) for name in ("value", "contribution", "share")),
            loss=None if saved["loss"] is None else real("loss", saved["loss"]),
        )


@dataclass(frozen=True)
class Inside:
    """The largest magnitude that a linear layer `reads` or `returns`."""

    name: str
    what: str
    largest: float

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Inside:
        what = words("what", saved["what"])
        return cls(words("name", saved["name"]), what, real("largest", saved["largest"], 0.0))


@dataclass(frozen=True)
class Float16:
    """Whether the model's values fit float16, which ends at 65,504.

    Attributes:
        layers: the largest magnitude of the residual stream at the output of each block.
        inside: the largest values inside branches (gate products, outputs of linear layers), the
            largest first; rescaling the residual stream leaves them as they are.
    """

    layers: Mapping[int, float]
    inside: tuple[Inside, ...]

    @property
    def largest(self) -> float:
        """Of the residual stream."""
        return max(self.layers.values(), default=0.0)

    @property
    def overflows(self) -> int | None:
        """The first block whose output is beyond float16; None: none is."""
        return next((layer for layer, largest in self.layers.items() if largest > FLOAT16), None)

    @property
    def overflows_inside(self) -> tuple[Inside, ...]:
        """What inside branches is beyond float16, for which rescaling does not help."""
        return tuple(inside for inside in self.inside if inside.largest > FLOAT16)

    @property
    def factor(self) -> float:
        """The mildest power of two that leaves the residual stream head room of two; 1: as it is.

        104,000    1/4, which makes it 26,000
        """
        over = self.largest * HEAD_ROOM / FLOAT16
        return 1.0 if over <= 1 else 2.0 ** -math.ceil(math.log2(over))

    def to_json(self) -> dict[str, Any]:
        inside = [vars(part) for part in self.inside]
        return {"layers": [[*item] for item in self.layers.items()], "inside": inside}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Float16:
        layers = {
            whole("layer", layer): real("largest", largest, 0.0)
            for layer, largest in items("layers", saved["layers"])
        }
        return cls(layers, tuple(map(Inside.from_json, items("inside", saved["inside"]))))


@dataclass(frozen=True)
class SinkUse:
    """How much the model leans on its first token, on one short text.

    Attributes:
        layers: of each layer that attends the share of attention that later tokens pay to the first
            one, mean over heads.
        perplexity: of the second half of the text; None: not measured, see `reason`.
        evicted: the same with the first token's keys and values gone from the cache by then.
        tokens: how many that half has.
        reason: why the perplexities were not measured; empty: they were.
    """

    layers: Mapping[int, float]
    perplexity: float | None = None
    evicted: float | None = None
    tokens: int = 0
    reason: str = ""

    @property
    def share(self) -> float:
        """Mean over layers."""
        return sum(self.layers.values()) / len(self.layers) if self.layers else 0.0

    @property
    def cost(self) -> float | None:
        """How many times as high eviction makes the perplexity; None: not measured."""
        if self.perplexity is None or self.evicted is None:
            return None
        return self.evicted / self.perplexity

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "layers": [[*item] for item in self.layers.items()]}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SinkUse:
        layers = {
            whole("layer", layer): real("share", share, 0.0)
            for layer, share in items("layers", saved["layers"])
        }
        numbers = {
            name: None if saved[name] is None else real(name, saved[name], 0.0)
            for name in ("perplexity", "evicted")
        }
        tokens = whole("tokens", saved["tokens"])
        return cls(layers, **numbers, tokens=tokens, reason=words("reason", saved["reason"]))


@dataclass(frozen=True)
class Measured:
    """The perplexity under one fake quantisation and one remedy; None: infinite or NaN."""

    quantisation: str
    remedy: str
    perplexity: float | None

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Measured:
        names = {name: words(name, saved[name]) for name in ("quantisation", "remedy")}
        value = saved["perplexity"]
        return cls(**names, perplexity=None if value is None else real("perplexity", value, 0.0))


def check_ratio(ratio: object) -> float:
    """A ratio of ranges.

    Raises:
        BadOption: it is none.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
        raise BadOption(f"ratio: {ratio!r}; give a number of at least 1, such as 10.0.")
    return float(ratio)
