"""What `detect` says of a layer, a role, a position or a channel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSummary:
    """Magnitudes at a block's output, mean over sequences: `top` three and exact `median`."""

    layer: int
    top: tuple[float, float, float]
    median: float

    @property
    def ratio(self) -> float:
        """Largest magnitude over the median."""
        return self.top[0] / self.median if self.median else float("inf")


@dataclass(frozen=True)
class TokenCount:
    """How many massive values are on one token of the vocabulary.

    Attributes:
        token: its id; -1: none, as of a learned prefix.
        text: what the tokenizer says it is.
        count: of the massive values.
    """

    token: int
    text: str
    count: int


@dataclass(frozen=True)
class RoleSummary:
    """The massive activations of a layer on tokens of one role.

    Attributes:
        layer: 0-based.
        role: of the tokens.
        count: how many values; a token has one in each channel that is massive at it.
        share: of the layer's massive activations.
        tokens: how many tokens hold them, without those that `Detection.not_placed` counts.
        words: which tokens of the vocabulary these are, the most frequent first, where `detect` was
            given a tokenizer.
    """

    layer: int
    role: str
    count: int
    share: float
    tokens: int = 0
    words: tuple[TokenCount, ...] = ()


@dataclass(frozen=True)
class PositionSummary:
    """How many massive activations are at one position of the sequence at a layer.

    Padding and prefix tokens have positions, too. In images a position is a `token` (its role) and,
    if that is a patch of a known grid, a `patch` (row, column); in text both are None. `count` is
    the number of values, `tokens` that of the tokens that hold them; `words` says which tokens of
    the vocabulary these are, the most frequent first, where `detect` was given a tokenizer.
    """

    layer: int
    position: int
    count: int
    token: str | None = None
    patch: tuple[int, int] | None = None
    tokens: int = 0
    words: tuple[TokenCount, ...] = ()

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.patch is not None:
            return str(self.patch)
        return str(self.position) if self.token in (None, "patch") else self.token


@dataclass(frozen=True)
class UniformChannel:
    """A channel whose magnitude is beyond 10 times the median at 95 % of the tokens or more.

    It is one of a block's output, and the median is that of the whole hidden state. Also one whose
    massive values are on more than half of the tokens (in text, of those that start no sequence):
    massive activations are on few, so it has no sites. One whose massive values are on few tokens
    has sites, however large the others are: both are true of it.

    Attributes:
        layer, channel: 0-based.
        magnitude: mean over the tokens.
        ratio: that over the layer's median, a mean over sequences.
        share: of the tokens at which the magnitude is beyond 10 medians.
    """

    layer: int
    channel: int
    magnitude: float
    ratio: float
    share: float
