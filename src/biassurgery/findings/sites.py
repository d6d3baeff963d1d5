"""Where massive activations sit and what they are worth: `Site` and `Sites`, their file format and
their sum.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from biassurgery.errors import BadOption, FileError, IncompatibleSites
from biassurgery.findings.files import read_tensors, write_tensors
from biassurgery.findings.published import published_run
from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table
from biassurgery.findings.tally import Level, Tally, levels, widespread

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

FORMAT = 1


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

    def __post_init__(self) -> None:
        """Numbers of numpy and torch become Python's, which can be saved."""
        kinds: dict[str, Any] = dict.fromkeys(("layer", "channel", "count", "cluster"), int)
        kinds |= dict.fromkeys(("mean", "std", "gate", "margin"), float)
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is None and name in ("gate", "margin"):
                continue
            try:
                number = kind(value)
            except (TypeError, ValueError) as error:
                raise BadOption(f"{name}: {value!r}; give a number.") from error
            if isinstance(value, str) or (kind is int and number != value):
                raise BadOption(
                    f"{name}: {value!r}; give {'an integer' if kind is int else 'a number'}."
                )
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class Origin:
    """What sites were measured on; a field that is None or empty is not known and not checked."""

    architecture: str | None = None
    layers: int | None = None
    width: int | None = None
    roles: tuple[str, ...] = ()
    min_magnitude: float | None = None
    min_ratio: float | None = None
    source: str = ""


class Sites(Printable, Sequence[Site]):
    """An immutable sequence of `Site`, with what it was measured on and, after `calibrate`, the
    tally it is derived from.

    `a + b` of two calibrations of one model is exactly the calibration on both data sets. `save`
    and `load` use one safetensors file with a JSON header.
    """

    def __init__(
        self,
        sites: Iterable[Site] = (),
        *,
        origin: Origin | None = None,
        tally: Tally | None = None,
    ) -> None:
        if isinstance(sites, (str, PathLike)) or not isinstance(sites, Iterable):
            raise BadOption(
                f"sites: {sites!r} is a {type(sites).__name__}; pass what calibrate() returned, or"
                " Sites.load(path)."
            )
        self._sites = tuple(sites)
        self.origin = origin or Origin()
        self.tally = tally
        for site in self._sites:
            if not isinstance(site, Site):
                raise BadOption(
                    f"sites: {site!r} is not a Site; build it with Site(layer=..., channel=...,"
                    " role=..., mean=...)."
                )

    @classmethod
    def from_tally(cls, tally: Tally, origin: Origin) -> Sites:
        """Derive the sites that a tally holds; a channel that is massive at most tokens of images
        has none, see `widespread`.
        """
        found, spread = _levels(tally, origin)
        sites = [
            Site(
                level.layer,
                level.channel,
                origin.roles[level.role],
                level.mean,
                level.std,
                level.count,
                level.gate,
                level.margin,
                level.cluster,
            )
            for level in found
            if (level.layer, level.channel) not in spread
        ]
        return cls(sites, origin=origin, tally=tally)

    @classmethod
    def published(cls, name: str, bos: bool | None = None) -> Sites:
        """Published sites of a public checkpoint; empty where no massive activations were found.
        Sources: `biassurgery.findings.published`.

        Args:
            name: of the checkpoint on the Hugging Face hub, in any case.
            bos: whether the model is used with a BOS token in front; None: as the checkpoint's own
                tokenizer does by default.

        Raises:
            CalibrationRequired: nothing is published for this name.
        """
        run = published_run(name, bos)
        found = [
            Site(
                site.layer,
                site.channel,
                site.role,
                site.value,
                site.observed_std,
                site.observed_count,
            )
            for site in run.sites
        ]
        return cls(found, origin=Origin(run.architecture, source=run.citation))

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        if isinstance(index, slice):
            return Sites(self._sites[index], origin=self.origin)
        return self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sites) and self._sites == other._sites and self.origin == other.origin
        )

    def __hash__(self) -> int:
        return hash((self._sites, self.origin))

    def __repr__(self) -> str:
        return (
            f"Sites({len(self)} sites in layers {self.layers()},"
            f" architecture={self.origin.architecture!r})"
        )

    def __rich__(self) -> Group | Text:
        """One row a site: where it is, its calibrated values, and how far they are from all others
        of the channel.
        """
        from rich.text import Text

        if not len(self):
            return Text(f"No massive activations{self._definition()}.")
        rows = table(
            "Massive activations",
            "layer",
            "channel",
            "role",
            "mean",
            "std",
            "count",
            "margin",
            left=("role",),
        )
        for site in self[:MOST_ROWS]:
            role = f"{site.role}, level {site.cluster + 1}" if site.cluster else site.role
            margin = "" if site.margin is None else f"{number(site.margin)}x"
            rows.add_row(
                str(site.layer),
                str(site.channel),
                role,
                number(site.mean),
                number(site.std),
                f"{site.count:,}",
                margin,
            )
        more = len(self) - MOST_ROWS
        return noted(rows, f"and {more} more, up to layer {self.layers()[-1]}" if more > 0 else "")

    def _definition(self) -> str:
        """What was looked for, where that is known."""
        magnitude = self.origin.min_magnitude
        ratio = self.origin.min_ratio
        if magnitude is None or ratio is None:
            return ""
        spread = ", ".join(map(str, sorted({channel for _, channel in self.widespread()})))
        but = (
            f", but for channels in which it is so at the majority of the tokens ({spread})"
            if spread
            else ""
        )
        return (
            f": no magnitude is above {magnitude:g} and above {ratio:g} times the median of its"
            f" sequence{but}"
        )

    def widespread(self) -> set[tuple[int, int]]:
        """Channels (layer, channel) of an image model that are massive by magnitude, but on more
        than half of all tokens.

        They are no massive activations, which are on few tokens, and have no sites. Text has none:
        its sequences may be all start tokens. Known where there is a tally.
        """
        return set() if self.tally is None else _levels(self.tally, self.origin)[1]

    def layers(self) -> list[int]:
        """Layers with at least one site, ascending."""
        return sorted({site.layer for site in self})

    def at(self, layer: int) -> Sites:
        """The sites of one layer."""
        return Sites((site for site in self if site.layer == layer), origin=self.origin)

    def __add__(self, other: Sites) -> Sites:
        """The calibration on both data sets.

        Raises:
            IncompatibleSites: measured on different models or with different thresholds, or not by
                `calibrate`.
        """
        if not isinstance(other, Sites):
            return NotImplemented
        if self.tally is None or other.tally is None:
            raise IncompatibleSites(
                "sites: only results of calibrate() add up; published, sliced or hand-made sites"
                " carry no tally. Calibrate on both data sets instead."
            )
        for name in ("architecture", "layers", "width", "roles", "min_magnitude", "min_ratio"):
            a = getattr(self.origin, name)
            b = getattr(other.origin, name)
            if a != b:
                raise IncompatibleSites(
                    f"sites: {name} is {a!r} on the left and {b!r} on the right; add calibrations"
                    " of one model with one definition only."
                )
        source = " + ".join(dict.fromkeys(filter(None, (self.origin.source, other.origin.source))))
        return Sites.from_tally(self.tally + other.tally, replace(self.origin, source=source))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the sites are in its JSON header.

        Raises:
            FileError: the file cannot be written.
        """
        tensors = {} if self.tally is None else {name: getattr(self.tally, name) for name in _TALLY}
        write_tensors(path, tensors, {"biassurgery.sites": json.dumps(self.header())})

    @classmethod
    def load(cls, path: str | Path) -> Sites:
        """Read what `save` wrote. Nothing but safetensors is read: no pickle is ever executed.

        Raises:
            FileError: missing, truncated, of another kind, or written by a newer version.
        """
        tensors, metadata = read_tensors(path)
        if "biassurgery.sites" not in metadata:
            raise FileError(
                f"path: {path} is a safetensors file but holds no sites; pass a file written by"
                " Sites.save()."
            )
        try:
            header = json.loads(metadata["biassurgery.sites"])
            if header.get("format") != FORMAT:
                raise FileError(
                    f"path: {path} has sites format {header.get('format')!r}, this version reads"
                    f" {FORMAT}; update biassurgery."
                )
            return cls.from_header(header, tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"path: {path} holds sites that cannot be read ({error!r}); save them again with"
                " Sites.save()."
            ) from error

    def header(self) -> dict[str, Any]:
        """Everything but the tensors of the tally, ready for JSON."""
        header = {
            "format": FORMAT,
            "origin": asdict(self.origin),
            "sites": [asdict(site) for site in self],
        }
        counts = (
            {}
            if self.tally is None
            else {"sequences": self.tally.sequences, "tokens": self.tally.tokens}
        )
        return header | counts

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Sites:
        """Rebuild sites from their JSON form and the tensors of their tally, if any."""
        origin = Origin(**{**header["origin"], "roles": tuple(header["origin"]["roles"])})
        known = {field.name for field in fields(Site)}
        sites = [
            Site(**{name: value for name, value in site.items() if name in known})
            for site in header["sites"]
        ]
        tally = None
        if "sequences" in header:
            tally = Tally(
                **{name: tensors[name] for name in _TALLY},
                sequences=header["sequences"],
                tokens=header["tokens"],
            )
        return cls(sites, origin=origin, tally=tally)


def _levels(tally: Tally, origin: Origin) -> tuple[list[Level], set[tuple[int, int]]]:
    """All levels of a tally, and the channels that are no massive activations for all their
    magnitude.
    """
    found = list(levels(tally, len(origin.roles)))
    return found, widespread(found, tally.tokens) if "patch" in origin.roles else set()


_TALLY = (*Tally.ROWS, "below", "medians")
