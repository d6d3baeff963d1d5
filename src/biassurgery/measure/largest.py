"""The largest magnitude in the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation
from biassurgery.measure.observe import observers
from biassurgery.measure.reading import reading
from biassurgery.surgery.edit import attached


def largest_in_stream(host: Host, batches: Iterable[Mapping[str, Any]]) -> float:
    """The largest magnitude that a block reads or returns.

    Raises:
        NonFiniteActivation: NaN or infinity.
    """
    largest = 0.0

    def see(layer: int, hidden: Tensor) -> None:
        nonlocal largest
        peak = hidden.abs().max().item()
        if not math.isfinite(peak):
            raise NonFiniteActivation(
                f"batches: block {layer} has NaN or infinity; {what_to_do(host)}."
            )
        largest = max(largest, peak)

    places = observers(host, see) + observers(host, see, "input", [0])
    with reading(host.root), attached(places):
        for batch in batches:
            host.adapter.run(host.model, batch)
    return largest
