"""The levels of a channel at one block: those that a patch replaces, and those that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

from biassurgery.errors import BadOption, warn
from biassurgery.findings.levels import CLUSTER_RATIO
from biassurgery.findings.site import Site


class Level(NamedTuple):
    """Values of a channel that belong together: their mean, and the least and greatest seen.

    Attributes:
        site: theirs; None: it is not among the sites of the patch, so the values stay.
    """

    site: Site | None
    mean: float
    low: float
    high: float


def levels_of(sites: Sequence[Site]) -> list[Level]:
    """All levels of a channel at one block, ascending: of its sites, and what was left out.

    Levels that stay are one where no site is between them.

    Raises:
        BadOption: values that stay cannot be told from those of the sites.
    """
    spans = {span[:2]: span[2:] for site in sites for span in site.spans}
    levels = [
        Level(site, site.mean, *spans.pop((site.role, site.cluster), (site.mean, site.mean)))
        for site in sites
    ]
    levels += [Level(None, (low + high) / 2, low, high) for low, high in spans.values()]
    ordered: list[Level] = []
    for level in sorted(levels, key=lambda level: level.mean):
        if ordered and level.site is None and ordered[-1].site is None:
            last = ordered.pop()
            low, high = min(last.low, level.low), max(last.high, level.high)
            level = Level(None, level.mean, low, high)
        ordered.append(level)
    _check_apart(ordered)
    return ordered


def leave_out(sites: Sequence[Site]) -> bool:
    """Whether the channel of these sites has levels there that are not among them."""
    known = {span[:2] for site in sites for span in site.spans}
    return not known <= {(site.role, site.cluster) for site in sites}


def boundaries(levels: Sequence[Level]) -> list[float]:
    """Where each level ends and the next begins.

    In the middle of two means; where one of the two stays, in the middle of the gap between them on
    a log scale, as gates are.
    """
    ends = []
    for i, (below, above) in enumerate(pairwise(levels), 1):
        if below.site is not None and above.site is not None:
            ends.append((below.mean + above.mean) / 2)
        else:
            low = max(level.high for level in levels[:i])
            high = min(level.low for level in levels[i:])
            ends.append(math.copysign(math.sqrt(max(low * high, 0.0)), low))
    return ends


def _check_apart(levels: Sequence[Level]) -> None:
    """Refuse levels that overlap, of which one stays; warn of those that are close."""
    for (i, here), (j, left) in product(enumerate(levels), repeat=2):
        site = here.site
        if site is None or left.site is not None:
            continue
        below, above = (here, left) if i < j else (left, here)
        values = (
            f"sites: in layer {site.layer}, channel {site.channel}, values from {left.low:g} to"
            f" {left.high:g} were left out, those of {site.role!r} are {here.low:g} to"
            f" {here.high:g}"
        )
        if below.high >= above.low:
            raise BadOption(
                f"{values}; a patch goes by value, not by token, and cannot tell them apart. Keep"
                " all sites of this channel, or leave it out."
            )
        near, far = sorted((abs(below.high), abs(above.low)))
        if below.high * above.low > 0 and far < CLUSTER_RATIO * near:
            warn(
                f"{values}; a patch tells them apart by value, and may take one for the other.",
            )
