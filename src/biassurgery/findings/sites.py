"""`Sites`: where massive activations sit and what they are worth, their file and their sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch import Tensor

from biassurgery.errors import BadOption, Incompatible
from biassurgery.findings.derived import derived_sites, standing_places, uniform_places
from biassurgery.findings.fields import items
from biassurgery.findings.finding import Finding, check_adds_up, check_finite
from biassurgery.findings.published import published_run, sites_of
from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table
from biassurgery.findings.site import Origin, Site
from biassurgery.findings.tally import Tally
from biassurgery.findings.tally_file import tally_of, tensors_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_ADVICE = "calibrate(model, batches) again"


class Sites(Printable, Finding, Sequence[Site]):
    """An immutable sequence of `Site`, what it was measured on and, after `calibrate`, its tally.

    `a + b` of two calibrations of one model is exactly the calibration on both data sets.

    Args:
        sites: in any order.
        origin: what they were measured on; None: not known, and not checked.
        tally: what they are derived from, which lets them be added up; None: not known.

    Raises:
        BadOption: something that is no `Site`, or one with a number that is not finite.
    """

    file_key: ClassVar[str] = "biassurgery.sites"
    what: ClassVar[str] = "sites"

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
        self.check()

    def check(self) -> None:
        for site in self._sites:
            numbers = {name: getattr(site, name) for name in ("mean", "std", "gate")}
            spans = {f"spans[{i}]": sum(span[2:]) for i, span in enumerate(site.spans)}
            check_finite(f"sites: {site}", numbers | spans, _ADVICE)

    @property
    def measured_on(self) -> dict[str, Any]:
        """Facts of the model that they were measured on, for `check_fits`."""
        origin = self.origin
        return {
            "architecture": origin.architecture,
            "layers": origin.layers,
            "width": origin.width,
        }

    @classmethod
    def from_tally(cls, tally: Tally, origin: Origin) -> Sites:
        """Derive the sites that a tally holds.

        A channel that is massive at most tokens has none, see `widespread`.
        """
        origin = replace(origin, starts=tally.starts or ())
        return cls(derived_sites(tally, origin), origin=origin, tally=tally)

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
        sites = sites_of(run)
        return cls(sites, origin=Origin(run.architecture, source=run.citation))

    def of_factor(self, factor: float) -> Sites:
        """The sites of the same model with its residual stream times a factor (mode `rescale`)."""
        sites = (site.times(factor / self.origin.factor) for site in self)
        return Sites(sites, origin=replace(self.origin, factor=factor))

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
        """One row a site: its place, calibrated values, and distance from the channel's others."""
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
        notes = [f"and {more} more, up to layer {self.layers()[-1]}"] if more > 0 else []
        standing = [
            f"layer {layer}, channel {channel} ({number(least)})"
            for (layer, channel), least in sorted(self.left_standing().items())
        ]
        if standing:
            notes.append(
                "set_zero leaves values that meet the definition where the model itself has none:"
                f" {'; '.join(standing)}"
            )
        return noted(rows, "\n  ".join(notes))

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
        """Channels (layer, channel) that are massive by magnitude, but on most of all tokens.

        They are no massive activations, which are on few tokens, and have no sites. In text start
        tokens do not count, and sequences of a few tokens do not tell. Known where there is a
        tally.
        """
        return set() if self.tally is None else uniform_places(self.tally, self.origin)

    def left_standing(self) -> dict[tuple[int, int], float]:
        """Where `set_zero` by default leaves values that meet the definition.

        Those that a model makes only where its massive values are missing: it takes them back in a
        later block, for instance, whether they are there or not. As the model itself has none
        there, there is no site. Known where there is a tally.

        Returns:
            The smallest such magnitude at each (layer, channel).
        """
        return {} if self.tally is None else standing_places(self.tally, self.origin)

    def layers(self) -> list[int]:
        """Layers with at least one site, ascending."""
        return sorted({site.layer for site in self})

    def at(self, layer: int) -> Sites:
        """The sites of one layer."""
        return Sites((site for site in self if site.layer == layer), origin=self.origin)

    def __add__(self, other: Sites) -> Sites:
        """The calibration on both data sets.

        Raises:
            Incompatible: measured on different models or with different thresholds, or not by
                `calibrate`.
        """
        if not isinstance(other, Sites):
            return NotImplemented
        if self.tally is None or other.tally is None:
            raise Incompatible(
                "sites: only results of calibrate() add up; published, sliced or hand-made sites"
                " carry no tally. Calibrate on both data sets instead."
            )
        check_adds_up(
            "sites",
            _definition(self.origin),
            _definition(other.origin),
            "add calibrations of one model with one definition only",
        )
        source = " + ".join(dict.fromkeys(filter(None, (self.origin.source, other.origin.source))))
        return Sites.from_tally(self.tally + other.tally, replace(self.origin, source=source))

    def header(self) -> dict[str, Any]:
        origin = asdict(self.origin)
        if origin["factor"] == 1:  # as earlier versions write it, which know no other
            del origin["factor"]
        header = {"origin": origin, "sites": [asdict(site) for site in self]}
        if self.tally is None:
            return header
        return header | {"sequences": self.tally.sequences, "tokens": self.tally.tokens}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.tally is None else tensors_of(self.tally)

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Sites:
        origin = Origin.from_json(header["origin"])
        sites = [Site.from_json(site) for site in items("sites", header["sites"])]
        for name, bound in (("layer", origin.layers), ("channel", origin.width)):
            beyond = [site for site in sites if bound is not None and getattr(site, name) >= bound]
            if beyond:
                raise BadOption(f"sites: {beyond[0]} is beyond the model's {bound}; {_ADVICE}.")
        tally = tally_of(header, tensors, len(origin.roles)) if "sequences" in header else None
        return cls(sites, origin=origin, tally=tally)


def _definition(origin: Origin) -> dict[str, Any]:
    """What sites that add up have in common."""
    return {name: value for name, value in vars(origin).items() if name not in ("source", "starts")}
