"""Watching the attention of one layer for sinks: sums over the batches of one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from biassurgery.errors import UnsupportedModel
from biassurgery.findings.grid import prefix_of
from biassurgery.findings.sums import Sums
from biassurgery.measure.candidates import Found
from biassurgery.measure.sequences import Sequences, positions_of
from biassurgery.ops.columns import Columns
from biassurgery.ops.decompose import bias_mass
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.shares import shares

_AT_ONCE = 32  # keys whose shares are in memory together


class OfKeys(NamedTuple):
    """The name of a sum over tokens whose large values have these keys in the `Tally`."""

    name: str
    keys: frozenset[int]


class Marked(NamedTuple):
    """The tokens of a batch that may hold massive activations.

    Attributes:
        group: (B, T) int64, the index of a token's group; -1: no candidate.
        groups: the keys of the candidates of a token, which those of a group share.
    """

    group: Tensor
    groups: list[frozenset[int]]

    @classmethod
    def of(cls, found: Found, shape: tuple[int, ...]) -> Marked:
        """The tokens of a batch of `shape` (B, T) that hold the candidates."""
        keys: dict[tuple[int, int], set[int]] = {}
        for row, token, key in zip(*(part.tolist() for part in found)):
            keys.setdefault((row, token), set()).add(key)
        group = torch.full(shape, -1, device="cpu")
        groups: dict[frozenset[int], int] = {}
        for place, held in keys.items():
            group[place] = groups.setdefault(frozenset(held), len(groups))
        return cls(group, list(groups))


class SinkEdit(AttentionEdit):
    """Adds up, by (layer, name), what a layer pays to start tokens and massive ones: (H,) float64.

    It changes nothing. The formulas are in docs/sinks.md.

    Args:
        layer: the key of its sums.
        route: the way of the attention to this library's core.
        roles: in images, the names of the roles whose attention is added up.
        epsilon: mean attention above which a token is a sink.
        totals: where the sums are kept.
        behind: how many tokens are behind the patches.

    Attributes:
        sequences: of the batch at hand.
        marked: the tokens that may hold massive activations at the layer's input; None: none.
    """

    child = "sink_statistics"

    def __init__(
        self,
        layer: int,
        route: type[EditedAttention],
        roles: tuple[str, ...],
        epsilon: float,
        totals: Sums,
        behind: int = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.roles = roles
        self.epsilon = epsilon
        self.totals = totals
        self.behind = behind
        self.sequences: Sequences | None = None
        self.marked: Marked | None = None

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        assert self.sequences is not None  # the pass has begun
        self._check_length(call, self.sequences)
        starts = self.sequences.starts.to(call.q.device)
        present = self.sequences.present.to(call.q.device)
        length = call.q.shape[2]
        queries = self.sequences.queries(starts, length) & present[:, None]
        others = queries & (torch.arange(length, device=starts.device)[:, None] != starts[:, None])
        on_start, is_sink = self._of_keys(
            call, lse, starts, mean_weights(others), mean_weights(queries)
        )
        sums: dict[str | OfKeys, Tensor] = {
            "attention": on_start.sum((0, 2)),
            "sink": is_sink.sum((0, 2)),
        }
        if self.marked is not None:
            sums |= self._overlap(call, lse, self.marked, on_start, others)
        if self.roles:
            sums |= self._on_roles(call, columns, lse)
        self._keep(sums)
        counts = torch.stack([present.sum(), others.any(1).sum(), others.sum()]).tolist()
        for name, count in zip(("sequences", "sequences with others", "others"), counts):
            self.totals.add((self.layer, name), count)

    @staticmethod
    def _check_length(call: Call, sequences: Sequences) -> None:
        """Refuse an attention whose queries and keys are not the tokens of the batch."""
        queries = call.q.shape[2]
        keys = call.k.shape[2]
        tokens = sequences.of.shape[1]
        if tokens not in (1, queries) or keys != queries:
            raise UnsupportedModel(
                f"model: an attention has {queries} queries and {keys} keys for {tokens} tokens, so"
                " that its sinks cannot be located."
            )

    def _keep(self, sums: dict[str | OfKeys, Tensor]) -> None:
        """Add (H,) tensors to the totals; one copy brings all of them from the device."""
        rows = torch.stack(list(sums.values())).cpu().double()
        for name, row in zip(sums, rows):
            self.totals.add((self.layer, name), row)

    def _of_keys(
        self, call: Call, lse: Tensor, keys: Tensor, weights: Tensor, sink_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the keys at positions `keys` (B, C) get.

        (B, H, C) each: their mean attention by `weights` (B, T, 1 or C), and whether that by
        `sink_weights` (B, T, C) makes a sink of them.
        """
        attention = []
        is_sink = []
        parts = zip(
            keys.split(_AT_ONCE, 1), weights.split(_AT_ONCE, 2), sink_weights.split(_AT_ONCE, 2)
        )
        for part, part_weights, part_sink_weights in parts:
            share = shares(call, lse, part)
            attention.append(_weighted(share, part_weights))
            is_sink.append((_weighted(share, part_sink_weights) > self.epsilon).float())
        return torch.cat(attention, 2), torch.cat(is_sink, 2)

    def _overlap(
        self, call: Call, lse: Tensor, marked: Marked, on_start: Tensor, others: Tensor
    ) -> dict[str | OfKeys, Tensor]:
        """Sums over the marked tokens, those with the same keys together.

        Of each sequence, `on_start` (B, H, N) is the attention on its start token and `others` (B,
        T, N) are its other tokens.
        """
        assert self.sequences is not None  # see() has asked
        group = marked.group.to(call.q.device)
        keys, present = positions_of(group >= 0)
        queries = self.sequences.queries(keys, call.q.shape[2]) & present[:, None]
        # The mean over the other tokens of a sequence of what they pay to ALL of these keys, so
        # every key has the same weights. A row of two sequences, of 3 and 2 tokens, has
        #     mean_weights(others)   0 1/2 1/2 0 0 | 0 0 0 0 1      their sum   0 1/2 1/2 0 1
        # A key in another sequence than the query gets nothing anyway, by the mask.
        weights = mean_weights(others).sum(2, keepdim=True) * present[:, None]
        attention, is_sink = self._of_keys(call, lse, keys, weights, mean_weights(queries))
        member = _member(group.gather(1, keys), len(marked.groups)) * present[..., None]
        starts = self.sequences.starts.to(group.device)
        starts_member = _member(group.gather(1, starts), len(marked.groups))
        counts = member.sum((0, 1)).tolist()
        by_group = {
            "on_massive": _by_group(attention, member),
            "massive_sink": _by_group(is_sink, member),
            "start_on_massive": _by_group(on_start, starts_member),
        }
        for of, count in zip(marked.groups, counts):
            self.totals.add((self.layer, OfKeys("massive tokens", of)), int(count))
        return {
            OfKeys(name, of): row
            for name, rows in by_group.items()
            for of, row in zip(marked.groups, rows)
        }

    def _on_roles(self, call: Call, columns: Columns | None, lse: Tensor) -> dict[str, Tensor]:
        """Sums over images of the mean attention on each token before the patches, on all patches,
        and on what is behind them.

        Patches get what neither these nor explicit biases take.
        """
        prefix = prefix_of(self.roles)
        tokens = torch.arange(call.q.shape[2], device=call.q.device)
        others = torch.cat([tokens[:prefix], tokens[len(tokens) - self.behind :]])
        on_others = shares(call, lse, others.expand(len(call.q), -1)).mean(2).sum(0)  # (H, C)
        on_patches = len(call.q) - on_others.sum(1)
        if columns is not None:
            on_patches = on_patches - bias_mass(call.q, columns, lse, call.scale).mean(2).sum(0)
        rows = [*on_others[:, :prefix].unbind(1), on_patches]
        if self.behind:
            rows.append(on_others[:, prefix:].sum(1))
        return {f"role {role}": row for role, row in zip(self.roles, rows)}


def mean_weights(chosen: Tensor) -> Tensor:
    """Weights by which a sum over queries is the mean over those chosen for a key.

    (B, T, C) bool -> float32; all 0 where a key has none.

        chosen of one key  0 1 1 1    weights  0 1/3 1/3 1/3
    """
    return chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)


def _member(group: Tensor, groups: int) -> Tensor:
    """(B, C) indices of groups, -1 for none -> (B, C, groups) float32, 1 at each one's own."""
    return (group[..., None] == torch.arange(groups, device=group.device)).float()


def _by_group(values: Tensor, member: Tensor) -> Tensor:
    """(G, H): sums of values (B, H, C) over the members (B, C, G) of each group."""
    return torch.einsum("bhc,bcg->gh", values, member.to(values.dtype))


def _weighted(share: Tensor, weights: Tensor) -> Tensor:
    """(B, H, T, C) summed over the queries with weights (B, T, 1 or C) -> (B, H, C)."""
    weights = weights.to(share.dtype).expand(-1, -1, share.shape[-1])
    return torch.einsum("bhtc,btc->bhc", share, weights)
