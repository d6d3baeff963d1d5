"""Attention sinks, and how they overlap with massive activations, as statistics of the pass that
`detect` makes.

A token k is a sink of a head if the mean over the queries t >= k of its sequence of the attention
A[t, k] exceeds epsilon (Gu et al. 2025, "When Attention Sink Emerges in Language Models", section
3.2). docs/sinks.md has all formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.findings.render import Printable, noted, table
from biassurgery.ops.columns import Columns
from biassurgery.ops.decompose import bias_mass
from biassurgery.surgery.attention import AttentionEdit, EditedAttention, check_attention
from biassurgery.surgery.call import Call
from biassurgery.surgery.shares import shares

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table

EPSILON = 0.3  # Gu et al. 2025
_START = 0  # the code of the role `start` of text models
_AT_ONCE = 32  # keys whose shares are in memory together
_BY_ROW = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "pixel_values")
)


@dataclass(frozen=True)
class LayerSinks:
    """One layer; tuples have an entry for each head. Massive activations are those at the layer's
    input.

    Attributes:
        attention: mean attention that other tokens of a sequence pay to its start token ([CLS], or
            the first token, in images).
        sink: share of the sequences whose start token is a sink.
        on_massive: mean attention that the same queries pay to all tokens with massive activations.
        massive_tokens: how many tokens hold massive activations; none are looked for at the input
            of layer 0, the embeddings.
        massive_sinks: share of all pairs (such a token, head) in which the token is a sink; NaN
            where there is no such token.
        start_massive: share of the attention on start tokens that goes to ones with massive
            activations.
        roles: in images, mean attention that a token pays to all tokens of a role.
    """

    layer: int
    attention: tuple[float, ...]
    sink: tuple[float, ...]
    on_massive: tuple[float, ...]
    massive_tokens: int
    massive_sinks: float
    start_massive: float
    roles: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Sinks(Printable):
    """Attention sinks of a model.

    Attributes:
        layers: one entry a layer.
        epsilon: mean attention above which a token is a sink.
        sequences, queries: how many start tokens, and how many other tokens of their sequences,
            were read.
    """

    layers: tuple[LayerSinks, ...]
    epsilon: float
    sequences: int
    queries: int

    @property
    def metric(self) -> float:
        """Share of all (sequence, layer, head) in which the start token is a sink: the sink metric
        of Gu et al. 2025.
        """
        every = [share for layer in self.layers for share in layer.sink]
        return sum(every) / len(every)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer: attention (mean over heads), attention_max, sink, on_massive,
        massive_tokens, massive_sinks, start_massive.
        """
        import pandas

        return pandas.DataFrame([self._row(layer) for layer in self.layers]).set_index("layer")

    def __rich__(self) -> Group:
        from rich.console import Group

        rows = table(
            "Attention on the start token, and on tokens with massive activations",
            "layer",
            "mean",
            "highest head",
            "sinks",
            "massive tokens",
            "on massive",
            "start on massive",
            "massive sinks",
        )
        for layer in self.layers:
            row = self._row(layer)
            overlap = (
                (row["on_massive"], row["start_massive"], row["massive_sinks"])
                if layer.massive_tokens
                else ()
            )
            rows.add_row(
                str(layer.layer),
                *map(_percent, (row["attention"], row["attention_max"], row["sink"])),
                f"{layer.massive_tokens:,}" if layer.massive_tokens else "",
                *map(_percent, overlap),
            )
        note = noted(
            rows,
            f"sink metric {_percent(self.metric)}: share of (sequence, layer, head) in which the"
            f" start token gets more than {self.epsilon:g} of the\n  attention (Gu et al. 2025);"
            " massive activations are those at a layer's input\n",
        )
        return Group(note, self._roles_table()) if self.layers[0].roles else note

    def _roles_table(self) -> Table:
        """One row a layer: attention on the tokens of each role, mean over heads."""
        rows = table("Attention by role", "layer", *self.layers[0].roles)
        for layer in self.layers:
            rows.add_row(
                str(layer.layer), *(_percent(_mean(values)) for values in layer.roles.values())
            )
        return rows

    @staticmethod
    def _row(layer: LayerSinks) -> dict[str, Any]:
        return {
            "layer": layer.layer,
            "attention": _mean(layer.attention),
            "attention_max": max(layer.attention),
            "sink": _mean(layer.sink),
            "on_massive": _mean(layer.on_massive),
            "massive_tokens": layer.massive_tokens,
            "massive_sinks": layer.massive_sinks,
            "start_massive": layer.start_massive,
        }


class Sequences(NamedTuple):
    """Which tokens of a batch belong together.

    Attributes:
        of: (B, T) int64, the number within its row of the sequence of a token; -1: padding.
        starts: (B, N) int64, where the sequences of a row start.
        present: (B, N) bool, which of them there are.
        causal: whether only the tokens from k on attend to token k.
    """

    of: Tensor
    starts: Tensor
    present: Tensor
    causal: bool

    @classmethod
    def read(cls, host: Host, batch: dict[str, Any]) -> Sequences:
        if host.adapter.modality == "image":
            rows = len(batch["pixel_values"])
            return cls(
                torch.zeros(rows, 1, dtype=torch.int64),
                torch.zeros(rows, 1, dtype=torch.int64),
                torch.ones(rows, 1, dtype=torch.bool),
                host.adapter.causal(host.model),
            )
        read = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        roles = host.adapter.token_roles(host.model, batch, (read.shape[0], read.shape[1]))
        begun = (roles == _START).cumsum(1)
        starts, present = positions_of(roles == _START)
        return cls(
            torch.where(roles == PADDING, -1, begun - 1),
            starts,
            present,
            host.adapter.causal(host.model),
        )

    def queries(self, at: Tensor, queries: int) -> Tensor:
        """(B, T, C) bool: which queries the keys at `at` (B, C) can expect attention from."""
        of = self.of.to(at.device).expand(-1, queries)
        mine = of[:, :, None] == of.gather(1, at)[:, None]
        return (
            mine & (torch.arange(queries, device=at.device)[:, None] >= at[:, None])
            if self.causal
            else mine
        )


class SinkStatistics:
    """The statistics of one pass: an edit that changes nothing on the attention of every layer.

    Raises:
        UnsupportedModel: the attention of a layer does not go through this library's core.
    """

    def __init__(self, host: Host, epsilon: float = EPSILON) -> None:
        self.host = host
        self.epsilon = epsilon
        self.modules = []
        for layer, block in enumerate(host.blocks):
            attention = host.adapter.attention(host.model, block)
            check_attention(attention.module, layer)
            self.modules.append((attention.module, _SinkEdit(attention.route, host, epsilon)))
        self.edits = [edit for _, edit in self.modules]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, every forward counts; call `begin` before each."""
        with ExitStack() as undo:
            for module, edit in self.modules:
                undo.callback(edit.detach, module)
                edit.attach(module)
            yield

    def begin(self, batch: dict[str, Any]) -> None:
        """Say which batch the next forward reads."""
        sequences = Sequences.read(self.host, batch)
        for edit in self.edits:
            edit.sequences = sequences
            edit.massive = None

    def see_massive(self, layer: int, tokens: Tensor) -> None:
        """Take the tokens (B, T) bool with massive activations at the output of a block."""
        if layer + 1 < len(self.edits):
            self.edits[layer + 1].massive = tokens

    def result(self) -> Sinks:
        first = self.edits[0]
        return Sinks(
            tuple(edit.summary(layer) for layer, edit in enumerate(self.edits)),
            self.epsilon,
            first.counted,
            first.others,
        )


def reason_against(host: Host, batch: dict[str, Any]) -> str | None:
    """Why the sinks of this model cannot be measured, found by a run of the first rows of a batch;
    None if they can.
    """
    if set(batch) <= _BY_ROW:
        batch = {
            name: value[:2] if isinstance(value, Tensor) else value for name, value in batch.items()
        }
    try:
        statistics = SinkStatistics(host)
        with statistics.attached():
            statistics.begin(batch)
            host.adapter.run(host.model, batch)
    except UnsupportedModel as error:
        return str(error)
    silent = [layer for layer, edit in enumerate(statistics.edits) if edit.totals is None]
    return (
        f"model: the attention of layers {silent} did not reach this library's core."
        if silent
        else None
    )


class _SinkEdit(AttentionEdit):
    """Sums over the batches of one layer, (H,) each, float64, on the CPU."""

    child = "sink_statistics"

    def __init__(self, route: type[EditedAttention], host: Host, epsilon: float) -> None:
        super().__init__()
        self.route = route
        self.epsilon = epsilon
        self.roles = host.roles if host.adapter.modality == "image" else ()
        self.sequences: Sequences | None = None
        self.massive: Tensor | None = None
        self.totals: dict[str, Tensor] | None = None
        self.counted = self.with_others = self.others = self.massive_tokens = 0

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        assert self.sequences is not None  # the pass has begun
        if (
            self.sequences.of.shape[1] not in (1, call.q.shape[2])
            or call.k.shape[2] != call.q.shape[2]
        ):
            raise UnsupportedModel(
                f"model: an attention has {call.q.shape[2]} queries and {call.k.shape[2]} keys for "
                f"{self.sequences.of.shape[1]} tokens, so that its sinks cannot be located."
            )
        device = call.q.device
        length = call.q.shape[2]
        starts = self.sequences.starts.to(device)
        present = self.sequences.present.to(device)
        queries = self.sequences.queries(starts, length) & present[:, None]
        others = queries & (torch.arange(length, device=device)[:, None] != starts[:, None])
        attention, sink = self._of_keys(
            call, lse, starts, _mean_weights(others), _mean_weights(queries)
        )
        sums = {"attention": attention.sum((0, 2)), "sink": sink.sum((0, 2))}
        if self.massive is not None:
            sums |= self._overlap(call, lse, self.massive.to(device), attention, others)
        if self.roles:
            sums |= self._on_roles(call, columns, lse)
        names = list(sums)
        moved = torch.stack([sums[name] for name in names]).cpu().double()
        totals = self.totals or {}
        self.totals = totals | {name: totals.get(name, 0) + row for name, row in zip(names, moved)}
        counts = torch.stack([present.sum(), others.any(1).sum(), others.sum()]).tolist()
        self.counted, self.with_others, self.others = (
            a + b for a, b in zip((self.counted, self.with_others, self.others), counts)
        )

    def _of_keys(
        self, call: Call, lse: Tensor, at: Tensor, others: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, H, C) the mean attention by the weights `others`, and whether that by `queries` makes
        a sink, both (B, T, C).
        """
        found = []
        for some, theirs, every in zip(
            at.split(_AT_ONCE, 1), others.split(_AT_ONCE, 2), queries.split(_AT_ONCE, 2)
        ):
            share = shares(call, lse, some)
            found.append(
                (_weighted(share, theirs), (_weighted(share, every) > self.epsilon).float())
            )
        attention, sink = zip(*found)
        return torch.cat(attention, 2), torch.cat(sink, 2)

    def _overlap(
        self, call: Call, lse: Tensor, massive: Tensor, on_start: Tensor, others: Tensor
    ) -> dict[str, Tensor]:
        """Sums over the tokens with massive activations."""
        at, present = positions_of(massive)
        queries = self.sequences.queries(at, call.q.shape[2]) & present[:, None]  # type: ignore[union-attr]
        # The mean over the other tokens of a sequence of their attention to all of these, which may
        # be in other sequences only by a mask.
        weights = _mean_weights(others).sum(2, keepdim=True) * present[:, None]
        attention, sink = self._of_keys(call, lse, at, weights, _mean_weights(queries))
        starts = self.sequences.starts.to(massive.device)  # type: ignore[union-attr]
        self.massive_tokens += int(present.sum())
        return {
            "on_massive": attention.sum((0, 2)),
            "massive_sink": sink.sum((0, 2)),
            "start_on_massive": (on_start * massive.gather(1, starts)[:, None]).sum((0, 2)),
        }

    def _on_roles(self, call: Call, columns: Columns | None, lse: Tensor) -> dict[str, Tensor]:
        """Sums over images of the mean attention on each prefix token, and on all patches."""
        prefix = torch.arange(len(self.roles) - 1, device=call.q.device).expand(len(call.q), -1)
        on_prefix = shares(call, lse, prefix).mean(2).sum(0)  # (H, C)
        rest = len(call.q) - on_prefix.sum(1)
        if columns is not None:
            rest = rest - bias_mass(call.q, columns, lse, call.scale).mean(2).sum(0)
        return {f"role {role}": row for role, row in zip(self.roles, (*on_prefix.unbind(1), rest))}

    def summary(self, layer: int) -> LayerSinks:
        totals = self.totals
        assert totals is not None  # a pass without batches was refused
        none = torch.zeros_like(totals["attention"])

        def mean(name: str, count: int) -> tuple[float, ...]:
            return tuple((totals.get(name, none) / max(count, 1)).tolist())

        on_start = totals["attention"].sum().item()
        massive_sinks = mean("massive_sink", self.massive_tokens)
        return LayerSinks(
            layer,
            mean("attention", self.with_others),
            mean("sink", self.counted),
            mean("on_massive", self.with_others),
            self.massive_tokens,
            _mean(massive_sinks) if self.massive_tokens else float("nan"),
            totals.get("start_on_massive", none).sum().item() / on_start if on_start else 0.0,
            {role: mean(f"role {role}", self.counted) for role in self.roles},
        )


def positions_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask (B, T) is true: positions (B, C), 0 where a row has fewer than C, and which of
    them there are (B, C) bool.
    """
    counts = chosen.sum(1)
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)[
        :, : max(1, int(counts.max()))
    ]
    present = torch.arange(order.shape[1], device=chosen.device) < counts[:, None]
    return torch.where(present, order, 0), present


def _mean_weights(chosen: Tensor) -> Tensor:
    """Weights of the mean over the queries: (B, T, C) bool -> float32; all 0 where there is
    none.
    """
    return chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)


def _weighted(share: Tensor, weights: Tensor) -> Tensor:
    """(B, H, T, C) summed over the queries with weights (B, T, 1 or C) -> (B, H, C)."""
    return torch.einsum(
        "bhtc,btc->bhc", share, weights.to(share.dtype).expand(-1, -1, share.shape[-1])
    )


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
