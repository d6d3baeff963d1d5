"""`Site`: one calibrated level, where and how large; `Origin`: what it was measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from biassurgery.errors import BadOption
from biassurgery.findings.fields import items, real, whole, words


class Span(NamedTuple):
    """One level of a channel: its role and cluster, and its least and greatest value."""

    role: str
    cluster: int
    low: float
    high: float


@dataclass(frozen=True)
class Site:
    """One calibrated level: the massive values of a role in one channel of one block's output.

    Attributes:
        layer: 0-based block index; the value is on the residual stream at the block's output.
        channel: 0-based residual channel.
        role: `start` or `elsewhere` in text; `cls`, `register:<i>` or `patch` in images
            (`distillation` in a distilled DeiT).
        mean, std: of the massive values (population standard deviation), in the units of the
            residual stream.
        count: how many values were seen.
        gate: a value of this channel is massive if its magnitude is beyond it; None: half the
            channel's smallest level.
        margin: smallest massive over largest other magnitude of the channel; None if not measured.
        cluster: which of the role's separate levels this is.
        first: whether `layers="first"` changes this channel at this block: its massive values are
            born there, or have grown since the last such block by more than the definition; None:
            not known, and told from the means.
        spans: of all levels of the channel at this block, this one included, by which a patch
            knows what has been left out of its sites; empty: not known.
    """

    layer: int
    channel: int
    role: str
    mean: float
    std: float = 0.0
    count: int = 1
    gate: float | None = None
    margin: float | None = None
    cluster: int = 0
    first: bool | None = None
    spans: tuple[Span, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Numbers of numpy and torch become Python's, which can be saved."""
        if not isinstance(self.role, str):
            raise BadOption(f"role: {self.role!r}; give a name, such as 'start'.")
        kinds: dict[str, Any] = dict.fromkeys(("layer", "channel", "count", "cluster"), int)
        kinds |= dict.fromkeys(("mean", "std", "gate", "margin"), float)
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is None and name in ("gate", "margin"):
                continue
            try:
                number = kind(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadOption(f"{name}: {value!r}; give a number.") from error
            if isinstance(value, (str, bool)) or (kind is int and number != value):
                raise BadOption(
                    f"{name}: {value!r}; give {'an integer' if kind is int else 'a number'}."
                )
            object.__setattr__(self, name, number)
        object.__setattr__(self, "spans", tuple(Span(*span) for span in self.spans))

    def times(self, factor: float) -> Site:
        """The same site of a model whose residual stream is so many times as large."""
        spans = tuple(
            span._replace(low=span.low * factor, high=span.high * factor) for span in self.spans
        )
        gate = None if self.gate is None else self.gate * factor
        mean, std = self.mean * factor, self.std * factor
        return replace(self, mean=mean, std=std, gate=gate, spans=spans)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Site:
        """The site of a file; fields that this version does not know are left out.

        Raises:
            BadOption, TypeError: a field is missing, or not what it can be.
        """
        known = {field.name for field in fields(cls)}
        site = cls(**{name: value for name, value in saved.items() if name in known})
        for name in ("layer", "channel", "count", "cluster"):
            whole(name, getattr(site, name))
        for name in ("std", "gate", "margin"):
            if -math.inf < (getattr(site, name) or 0.0) < 0:  # what is not finite has its own check
                raise BadOption(f"{name}: {getattr(site, name)!r}; give a number of at least 0.")
        if site.first is not None and not isinstance(site.first, bool):
            raise BadOption(f"first: {site.first!r}; give true, false or null.")
        for span in site.spans:
            words("role", span.role)
            whole("cluster", span.cluster)
            real("low", span.low)
            real("high", span.high)
        return site


@dataclass(frozen=True)
class Origin:
    """What sites were measured on; a field that is None or empty is not known and not checked.

    Attributes:
        architecture: family of the model, as its adapter says (`config.model_type`).
        layers: number of blocks.
        width: channels of the residual stream.
        roles: of the tokens, in the order in which a tally counts them.
        min_magnitude, min_ratio: the definition of a massive activation.
        source: what the data were, in words.
        start: the id of the token that `start=` put in front of every sequence; None: it put none.
        starts: the ids of the tokens that sequences began with, ascending: one where it was a
            constant; of many the smallest few.
        factor: of the residual stream (mode `rescale`), in whose units the numbers are.
    """

    architecture: str | None = None
    layers: int | None = None
    width: int | None = None
    roles: tuple[str, ...] = ()
    min_magnitude: float | None = None
    min_ratio: float | None = None
    source: str = ""
    start: int | None = None
    starts: tuple[int, ...] = field(default=(), compare=False)
    factor: float = 1.0

    @property
    def start_token(self) -> int | None:
        """The id of the token that all sequences began with; None: it varied, or is not known."""
        return self.starts[0] if len(self.starts) == 1 else None

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Origin:
        """The origin of a file.

        Raises:
            BadOption, TypeError: a field is missing, unknown, or not what it can be.
        """
        roles = tuple(words("role", role) for role in items("roles", saved["roles"]))
        starts = tuple(whole("starts", token) for token in items("starts", saved.get("starts", [])))
        origin = cls(**{**saved, "roles": roles, "starts": starts})
        real("factor", origin.factor, 0.0)
        words("architecture", origin.architecture or "")
        words("source", origin.source)
        for name in ("layers", "width"):
            whole(name, 1 if getattr(origin, name) is None else getattr(origin, name), 1)
        whole("start", origin.start or 0)
        for name in ("min_magnitude", "min_ratio"):
            real(name, 0.0 if getattr(origin, name) is None else getattr(origin, name))
        return origin
