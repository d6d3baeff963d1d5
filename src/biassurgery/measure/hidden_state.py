"""What one block's output looks like over sequences: tables 1 and 2 of Sun et al. 2024."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from biassurgery.errors import BadBatch
from biassurgery.findings.hidden_state import CarrierTable, MagnitudeTable, VariationTable
from biassurgery.measure.state_sums import Held, PlaceSums, RankSums


def magnitude_table(hidden: Tensor, layer: int) -> MagnitudeTable:
    """The largest magnitudes of each sequence's hidden state, means over sequences.

    The k-th of n by size is at rank k; the top 1 % is the one at rank n / 100, the median that at
    rank n / 2, rounded.

    Args:
        hidden: (N, T, D) the outputs of a block for N sequences without padding, for example what
            `record(model, "block_output", layers=[layer])` gives.
        layer: 0-based index of the block, for the report.

    Raises:
        BadBatch: another shape, or NaN or infinity.
    """
    sums = RankSums()
    for state in _checked(hidden):
        sums.add(state)
    return MagnitudeTable(layer, sums.rows())


def variation_table(hidden: Tensor, layer: int) -> VariationTable:
    """Mean and variance, over sequences, of the values at some places (token, channel).

    Massive activations vary little; values elsewhere have variances beyond their means squared.

    Args:
        hidden: (N, T, D) as in `magnitude_table`, of two sequences or more.
        layer: 0-based index of the block, for the report.

    Raises:
        BadBatch: another shape, NaN or infinity, or one sequence.
    """
    states = _checked(hidden)
    if len(states) < 2:
        raise BadBatch("hidden: one sequence, over which nothing varies; give two or more.")
    sums = PlaceSums()
    for state in states:
        sums.add(state)
    return VariationTable(layer, sums.rows())


def carrier_table(
    hidden: Tensor,
    ids: Tensor,
    layer: int,
    text_of: Callable[[int], str],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
) -> CarrierTable:
    """Which tokens hold the values that meet the definition of a massive activation.

    Args:
        hidden: (N, T, D) as in `magnitude_table`.
        ids: (N, T) int64, their token ids.
        layer: 0-based index of the block, for the report.
        text_of: from a token id to what it stands for.
        min_magnitude, min_ratio: the definition, as in `detect`.

    Raises:
        BadBatch: shapes that do not fit, or NaN or infinity.
    """
    states = _checked(hidden)
    if ids.shape != hidden.shape[:2]:
        raise BadBatch(
            f"ids: shape {tuple(ids.shape)}, but hidden has {tuple(hidden.shape)}; give the token"
            " ids (N, T) that it was computed from."
        )
    held = Held(min_magnitude, min_ratio)
    for state, row in zip(states, ids.cpu()):
        held.add(state, row)
    return CarrierTable(layer, held.carriers(text_of))


def _checked(hidden: Tensor) -> Tensor:
    """(N, T, D) float64 on the CPU."""
    if hidden.dim() != 3 or not hidden.numel():
        raise BadBatch(f"hidden: shape {tuple(hidden.shape)}; give hidden states (N, T, D).")
    values = hidden.detach().cpu().double()
    if not values.isfinite().all():
        raise BadBatch("hidden: it holds NaN or infinity; compute in float32.")
    return values
