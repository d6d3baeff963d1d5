"""Sites from as little of a text as tells what they are worth."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host
from biassurgery.data.batches import as_batches, as_inputs
from biassurgery.data.start import behind_start
from biassurgery.findings.site import Site
from biassurgery.findings.sites import Sites
from biassurgery.measure.calibrate import warn_of_narrow_margins
from biassurgery.measure.confirm import confirm
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.ranks import taking_part
from biassurgery.measure.reading import reading

LEAST = 4096  # tokens
FEWEST = 4  # values of a site, by which its spread can be judged
CLOSE = 0.01  # standard error of a mean, over the mean, that is small enough
_WARM = 8  # tokens of a first forward, which is slower than those after it
_OBSERVED = 1.6  # times a forward: what is measured of it, on two CPU cores
_CONFIRMED = 4  # sequences that are run again, see `confirm`


class Seconds(NamedTuple):
    """How long a brief calibration will take, at least and at most."""

    least: float
    most: float

    def __str__(self) -> str:
        least, most = (math.ceil(seconds) for seconds in self)
        if most <= 1:
            return "a second"
        return f"{least} s" if least == most else f"{least} to {most} s"


def calibrate_briefly(host: Host, batches: Iterable[Tensor], start: int | None) -> Sites:
    """`calibrate` that stops as soon as the means are known well enough, see `until_settled`.

    Every rank of `torch.distributed` measures for itself.

    Args:
        host: a text model.
        batches: (B, T) int64 each.
        start: the id of a token to put in front of every sequence; None: none.

    Raises:
        SurgeryError: as `calibrate`.
    """
    with taking_part("calibrate", host.root, False):
        massive = MassiveActivations(host, start=start)
        one_pass = Pass(host, 100.0, 1000.0, [massive])
        checked = behind_start(host, as_batches(host, batches), start)
        one_pass.read(until_settled(checked, massive), "calibrating", None)
        confirm(host, massive)
    sites = massive.result()
    warn_of_narrow_margins(sites)
    return sites


def until_settled(
    batches: Iterable[dict[str, Any]], massive: MassiveActivations
) -> Iterator[dict[str, Any]]:
    """The batches up to the one by which the sites are settled.

    That is so where `LEAST` tokens have been read, the last batch has added no site, and the
    standard error of every mean is at most `CLOSE` of it. Which batch that is depends on the
    numbers alone.
    """
    before: set[tuple[Any, ...]] = set()
    for batch in batches:
        yield batch
        sites = massive.result()
        places = {(site.layer, site.channel, site.role, site.cluster) for site in sites}
        enough = massive.totals.tokens >= LEAST and all(map(_is_known, sites))
        if enough and places and places == before:
            return
        before = places


def _is_known(site: Site) -> bool:
    error = site.std / math.sqrt(site.count)
    return site.count >= FEWEST and error <= CLOSE * abs(site.mean)


def seconds_of(host: Host, batches: list[Tensor]) -> Seconds:
    """How long that will take, by the time of one sequence."""
    sequence = batches[0][:1]
    for tokens in (sequence[:, :_WARM], sequence):
        began = time.perf_counter()
        with reading(host.model):
            device = input_device(host.model)
            host.adapter.run(host.model, as_inputs(host, tokens, device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    all_sequences = sum(map(len, batches))
    least = min(all_sequences, math.ceil(LEAST / sequence.shape[1]))
    return Seconds(
        *(_OBSERVED * seconds * (count + _CONFIRMED) for count in (least, all_sequences))
    )
