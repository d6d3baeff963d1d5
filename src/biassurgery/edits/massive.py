"""The edits of the activation modes: what happens to the massive values of a block's output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from biassurgery.edits.levels import boundaries, levels_of
from biassurgery.errors import BatchTooSmall, LevelOverflow
from biassurgery.findings.births import gate_of
from biassurgery.findings.sites import Site, Sites
from biassurgery.ops.at_hand import at_hand
from biassurgery.ops.heads import cast
from biassurgery.ops.levels import is_massive, nearest_level, of_nearest_level
from biassurgery.surgery.alike import alike
from biassurgery.surgery.block import BlockEdit

_REACH = 6.0  # standard deviations that the dtype must leave room for around a level with noise


class MassiveEdit(BlockEdit):
    """Replaces the massive values of the calibrated channels; subclasses say by what.

    The values are found by their gate, not by position, so prefill, cached decoding, padding and
    packing need no care; shapes are static and nothing is read back to the host. Levels that the
    channel has, but the sites have not (they were filtered), are told by their values and stay.

    Raises:
        BadOption: they cannot be told from those of the sites.
    """

    channels: Tensor  # (C,) int64
    gates: Tensor  # (C,) float32
    # (C, L - 1) float32, between the levels of a channel in ascending order; NaN beside absent ones
    middles: Tensor
    kept: Tensor | None  # (C, L) bool, which levels are replaced; None: all are

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        channels = sorted({site.channel for site in sites})
        in_channel = [[site for site in sites if site.channel == channel] for channel in channels]
        self.by_channel = [levels_of(group) for group in in_channel]
        self.register_buffer("channels", torch.tensor(channels), persistent=False)
        gates = [gate_of(group) for group in in_channel]
        self.register_buffer("gates", torch.tensor(gates, dtype=torch.float32), persistent=False)
        middles = self.table([boundaries(group) for group in self.by_channel])
        self.register_buffer("middles", middles, persistent=False)
        is_kept = [[level.site is not None for level in group] for group in self.by_channel]
        left_out = not all(map(all, is_kept))
        kept = self.table(is_kept) == 1 if left_out else None
        self.register_buffer("kept", kept, persistent=False)

    def __setstate__(self, state: Any) -> None:
        """One of a file from before sites could be filtered replaces all levels."""
        super().__setstate__(state)
        if "kept" not in self._buffers:
            self.register_buffer("kept", None, persistent=False)

    @staticmethod
    def table(rows: Sequence[Sequence[float]]) -> Tensor:
        """(C, L) float32 of rows of unequal length, filled up with NaN."""
        longest = max(map(len, rows))
        return torch.tensor(
            [[*row] + [torch.nan] * (longest - len(row)) for row in rows], dtype=torch.float32
        )

    def by_level(self, numbers: dict[Site, float]) -> Tensor:
        """(C, L) float32 of a number for each site; levels that stay have any of them."""
        any_number = next(iter(numbers.values()))
        return self.table(
            [
                [any_number if level.site is None else numbers[level.site] for level in levels]
                for levels in self.by_channel
            ]
        )

    def massive(self, x: Tensor) -> Tensor:
        """Which values are replaced: x (B, T, C) in any dtype -> (B, T, C) bool."""
        x = cast(x, torch.float32)
        massive = is_massive(x, self.gates)
        if self.kept is None:
            return massive
        return massive & of_nearest_level(x, self.middles, self.kept)

    def none_massive(self, x: Tensor) -> bool:
        """Whether x (B, T, C) is known to hold nothing that is replaced, as most steps of decoding
        do; False where it would take longer to know than to replace.
        """
        if self.mesh is not None or not at_hand(x):  # ranks must go one way, all of them
            return False
        gates = self.gates.tolist()
        tokens = [token for row in x.tolist() for token in row]
        return not any(abs(value) > gate for token in tokens for value, gate in zip(token, gates))

    def replacement(self, x: Tensor, massive: Tensor) -> Tensor:
        """What to put where `massive`: x (B, T, C) in the model's dtype -> (B, T, C) or (C,)."""
        raise NotImplementedError  # abstract

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        x = hidden.index_select(-1, self.channels)
        if self.none_massive(x):
            return hidden
        massive = self.massive(x)
        new = torch.where(massive, cast(self.replacement(x, massive), x.dtype), x)
        return hidden.index_copy(-1, self.channels, new)


class WriteEdit(MassiveEdit):
    """Writes one value for each level, plus `spread` times standard normal noise where given."""

    values: Tensor  # (C, L) float32
    spread: Tensor | None  # (C, L) float32

    def __init__(
        self, sites: Sites, values: dict[Site, float], spread: dict[Site, float] | None = None
    ) -> None:
        super().__init__(sites)
        self.register_buffer("values", self.by_level(values), persistent=False)
        noise = None if spread is None else self.by_level(spread)
        self.register_buffer("spread", noise, persistent=False)
        self.constant = spread is None and len(set(values.values())) == 1
        stds = spread or {}
        self.largest = max(abs(values[site]) + _REACH * stds.get(site, 0.0) for site in sites)

    def replacement(self, x: Tensor, massive: Tensor) -> Tensor:
        check_holds(x.dtype, self.largest)
        if self.constant:
            return self.values[:, 0]
        x = cast(x, torch.float32)
        value = of_nearest_level(x, self.middles, self.values)
        if self.spread is None:
            return value
        noise = alike(torch.randn_like(x), self.mesh)
        return value + of_nearest_level(x, self.middles, self.spread) * noise


class ShuffleEdit(MassiveEdit):
    """Gives each sequence the massive values of another one of the batch.

    The same token's if that is massive there, else those of its first massive token.
    """

    def replacement(self, x: Tensor, massive: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows < 2:
            raise BatchTooSmall(
                f"mode: 'shuffle' takes values of other sequences, but the batch has {rows}; run at"
                " least two together."
            )
        level = torch.where(massive, nearest_level(x.float(), self.middles), -1)
        draw = alike(torch.rand((), device=x.device), self.mesh)
        new = x
        # Level by level, so that a start token's value never lands on a delimiter. Everything below
        # is done for all channels at once: donors and first tokens differ from channel to channel.
        for index in range(self.middles.shape[1] + 1):
            at_level = level == index  # (B, T, C)
            # Each row's value at its first token of this level (argmax finds the first True), or
            # at token 0 where it has none: nobody reads that, for only rows that have one give.
            first = x.gather(1, at_level.to(torch.uint8).argmax(1, keepdim=True))  # (B, 1, C)
            donor = _another(at_level.any(1), draw)[:, None]  # (B, 1, C): a row for each channel
            donated = torch.where(
                at_level.gather(0, donor.expand_as(at_level)),  # does the donor have it here, too?
                x.gather(0, donor.expand_as(x)),
                first.gather(0, donor),
            )
            new = torch.where(at_level, donated, new)
        return new


def _another(has: Tensor, draw: Tensor) -> Tensor:
    """For each row that has something, another one that has, or itself if there is none.

    has (B, C) bool, draw () in [0, 1) -> (B, C).

    The rows that have something are turned by 1 to n - 1 places, as `draw` says, so that no two get
    the same one. One channel of 4 rows, of which 0, 2 and 3 have something, turned by 1 place:

        has       1 0 1 1       order  0 2 3 1   (the rows that have something come first)
        place     0 0 1 2       (place + 1) % 3   1 1 2 0   ->   donors 2 . 3 0
    """
    count = has.sum(0)
    step = 1 + (draw * (count - 1)).long()
    order = has.to(torch.uint8).argsort(stable=True, dim=0, descending=True)
    place = has.cumsum(0) - 1
    return order.gather(0, (place + step) % count.clamp(min=1))


class ZeroRandomEdit(MassiveEdit):
    """The control: at each massive value, another channel of the same token becomes zero."""

    others: Tensor  # (C,) int64

    def __init__(self, sites: Sites, width: int, seed: int, avoided: Collection[int] = ()) -> None:
        super().__init__(sites)
        massive = {*avoided, *self.channels.tolist()}
        others = torch.tensor([c for c in range(width) if c not in massive])
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        chosen = others[order[: len(self.channels)]]
        self.register_buffer("others", chosen, persistent=False)

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        massive = self.massive(hidden.index_select(-1, self.channels))
        x = hidden.index_select(-1, self.others)
        return hidden.index_copy(-1, self.others, torch.where(massive, 0, x))


class PositionEdit(BlockEdit):
    """Writes one value at given channels and absolute positions, whatever stands there."""

    positional = True
    positions: Tensor  # (P,) int64
    selected: Tensor  # (D,) bool

    def __init__(
        self,
        value: float,
        channels: tuple[int, ...],
        positions: tuple[int, ...],
        width: int,
        layer: int,
    ) -> None:
        super().__init__()
        self.value = value
        self.cache_layer = layer
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        selected = torch.zeros(width, dtype=torch.bool).index_fill(0, torch.tensor(channels), True)
        self.register_buffer("selected", selected, persistent=False)

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        check_holds(hidden.dtype, abs(self.value))
        positions = torch.arange(hidden.shape[1], device=hidden.device) + start
        written = torch.isin(positions, self.positions)
        return torch.where(written[:, None] & self.selected, self.value, hidden)


def check_holds(dtype: torch.dtype, largest: float) -> None:
    """Raise `LevelOverflow` where the model was cast after it had been patched."""
    if largest > torch.finfo(dtype).max:
        raise LevelOverflow(
            f"model: its hidden states are {dtype} now, which cannot hold the level {largest:g};"
            " unpatch it, or keep it in bfloat16 or float32."
        )
