"""What one block's output looks like over sequences: tables 1 and 2 of Sun et al. 2024."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from biassurgery.errors import BadBatch
from biassurgery.findings.hidden_state import (
    Carrier,
    CarrierTable,
    MagnitudeTable,
    RankedMagnitude,
    Variation,
    VariationTable,
)

_RANKS = {f"top {rank}": rank for rank in (1, 2, 3, 4, 5, 10, 100)}
_SHARES = {"top 1 %": 0.01, "top 10 %": 0.1, "median": 0.5}
_PLACES = ("top 1", "top 2", "top 1 %", "top 10 %", "median")


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
    magnitudes = _checked(hidden).abs().flatten(1)
    total = magnitudes.shape[1]
    rows = [
        RankedMagnitude(name, magnitudes.kthvalue(total + 1 - rank, dim=1).values.mean().item())
        for name, rank in _ranks(total).items()
    ]
    return MagnitudeTable(layer, tuple(rows))


def variation_table(hidden: Tensor, layer: int) -> VariationTable:
    """Mean and variance, over sequences, of the values at some places (token, channel).

    Massive activations vary little; values elsewhere have variances beyond their means squared.

    Args:
        hidden: (N, T, D) as in `magnitude_table`, of two sequences or more.
        layer: 0-based index of the block, for the report.

    Raises:
        BadBatch: another shape, NaN or infinity, or one sequence.
    """
    values = _checked(hidden)
    if len(values) < 2:
        raise BadBatch("hidden: one sequence, over which nothing varies; give two or more.")
    order = values.abs().mean(0).flatten().argsort(descending=True)
    ranks = _ranks(len(order))
    rows = []
    for name in (name for name in _PLACES if name in ranks):
        token, channel = divmod(int(order[ranks[name] - 1]), values.shape[2])
        here = values[:, token, channel]
        mean = here.mean().item()
        rows.append(Variation(name, token, channel, mean, here.var(correction=0).item()))
    return VariationTable(layer, tuple(rows))


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
    values = _checked(hidden)
    if ids.shape != hidden.shape[:2]:
        raise BadBatch(
            f"ids: shape {tuple(ids.shape)}, but hidden has {tuple(hidden.shape)}; give the token"
            " ids (N, T) that it was computed from."
        )
    medians = values.abs().flatten(1).median(1).values
    threshold = (min_ratio * medians).clamp(min=min_magnitude)
    row, position, channel = (values.abs() > threshold[:, None, None]).nonzero(as_tuple=True)
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    seen = zip(channel.tolist(), ids.cpu()[row, position].tolist(), position.tolist())
    for (where, token, at), value in zip(seen, values[row, position, channel].tolist()):
        found.setdefault((where, token), []).append((at, value))
    rows = [
        Carrier(
            where,
            token,
            text_of(token),
            (min(at for at, _ in held), max(at for at, _ in held)),
            len(held),
            sum(value for _, value in held) / len(held),
        )
        for (where, token), held in found.items()
    ]
    rows.sort(key=lambda row: (-row.count, -abs(row.mean)))
    return CarrierTable(layer, tuple(rows))


def _ranks(total: int) -> dict[str, int]:
    """The ranks that there are among so many values, from 1, by name."""
    ranks = {name: rank for name, rank in _RANKS.items() if rank <= total}
    return ranks | {name: max(1, round(share * total)) for name, share in _SHARES.items()}


def _checked(hidden: Tensor) -> Tensor:
    """(N, T, D) float64 on the CPU."""
    if hidden.dim() != 3 or not hidden.numel():
        raise BadBatch(f"hidden: shape {tuple(hidden.shape)}; give hidden states (N, T, D).")
    values = hidden.detach().cpu().double()
    if not values.isfinite().all():
        raise BadBatch("hidden: it holds NaN or infinity; compute in float32.")
    return values
