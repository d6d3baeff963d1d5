"""`sink_kinds`: which attention sinks do nothing, and which send the same to all.

Source: Fesser et al. 2026 (arXiv 2606.08105). A sink whose value is near zero makes its head do
nothing (nop); one with a value as large as others sends all queries one vector (broadcast).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.layers import integers
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.sink_kinds import HeadSinks, SinkKinds, kind_of
from biassurgery.findings.sums import Sums
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.sequences import Sequences
from biassurgery.ops.columns import Columns
from biassurgery.ops.decompose import value_updates
from biassurgery.ops.heads import repeat_heads
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import attached
from biassurgery.surgery.shares import keys_at, shares


def sink_kinds(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    sink_tokens: int | Sequence[int] | None = None,
    min_share: float = 0.3,
    max_value: float = 0.25,
    max_rank: float = 1.5,
    progress: bool | None = None,
    tower: Tower | None = None,
) -> SinkKinds:
    """Tell attention sinks that do nothing from those that send the same to all, head by head.

    Both look alike in a map of attention. A `nop` sink has a value near zero: attention that goes
    there is switched off. A `broadcast` sink has a value of ordinary size, and all queries of a
    sequence get the same vector from it: a bias, or news of the whole sequence. Effective ranks are
    exponentials of the entropy of singular values; memory is O(T) a layer, and no T x T matrix is
    made.

    Args:
        model: a model of a supported architecture.
        batches: see `detect`; a row is taken as one sequence in the ranks.
        sink_tokens: positions in the row, padding included. None: the first token of each sequence
            that is not padding ([CLS] in images).
        min_share: of the attention, from which on a head has a sink.
        max_value: the norm of the sinks' values over that of others, up to which they are `nop`.
        max_rank: the effective rank of what sinks send up to which they are `broadcast`; beyond it
            they are `mixed`.
        progress: show a progress bar; None: only on a terminal.
        tower: `vision` (default) or `text`, of a model that has both.

    Raises:
        BadBatch: no data, or sequences without another token.
        BadOption: positions or thresholds that cannot be used.
        NonFiniteActivation: what an attention returns holds NaN or infinity.
        UnsupportedModel: the attention of this architecture does not go through this library's
            core.
    """
    limits = _checked(min_share=min_share, max_value=max_value, max_rank=max_rank)
    given = None if sink_tokens is None else _positions(sink_tokens)
    host = find_host(model, tower)
    edits = {layer: _Sent(attention.route, given) for layer, attention in attentions(host).items()}
    places = [attention.place(n, edits[n]) for n, attention in attentions(host).items()]
    with reading(host.model), attached(places):
        for batch in with_bar(as_batches(host, batches), "sinks", progress):
            for edit in edits.values():
                edit.sequences = Sequences.read(host, batch)
            host.adapter.run(host.model, batch)
            _check_finite(host, edits)
    first = next(iter(edits.values())).sums
    if not first.get("queries"):
        raise BadBatch(
            "batches: no token sees a sink other than itself; give sequences of two tokens or more."
        )
    heads = [head for layer, edit in edits.items() for head in _heads(layer, edit.sums, limits)]
    return SinkKinds(tuple(heads), *limits, int(first["sequences"]), int(first["queries"]))


def _check_finite(host: Host, edits: Mapping[int, _Sent]) -> None:
    for layer, edit in edits.items():
        if not edit.finite:
            raise NonFiniteActivation(
                f"batches: the attention of block {layer} returns NaN or infinity;"
                f" {what_to_do(host)}."
            )


def _positions(given: int | Sequence[int]) -> tuple[int, ...]:
    positions = integers("sink_tokens", given, "give one or more positions, counted from 0")
    if min(positions) < 0:
        raise BadOption(f"sink_tokens: {positions} has a negative one; count from the beginning.")
    return tuple(dict.fromkeys(positions))


def _checked(**limits: float) -> tuple[float, float, float]:
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise BadOption(f"{name}: {value!r}; give a number above 0.")
    min_share, max_value, max_rank = limits.values()
    return float(min_share), float(max_value), float(max_rank)


class _Sent(AttentionEdit):
    """Sums by name over the heads (H,) of one attention; it changes nothing.

    Args:
        route: the way of the attention to this library's core.
        given: positions of the sinks; None: the start tokens.

    Attributes:
        sequences: of the batch at hand.
        finite: whether all that the attention has returned is finite; nothing is counted of what
            is not.
    """

    child = "sink_kinds"

    def __init__(self, route: type[EditedAttention], given: tuple[int, ...] | None) -> None:
        super().__init__()
        self.route = route
        self.given = given
        self.sequences: Sequences | None = None
        self.finite = True
        self.sums = Sums()

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        self.finite = self.finite and bool(out.isfinite().all() & call.v.isfinite().all())
        if not self.finite:
            return
        keys, present = self._sinks(call)
        is_sink, real = self._tokens(call, keys, present)
        assert self.sequences is not None  # _sinks has looked
        sees = self.sequences.queries(keys, call.q.shape[2]) & present[:, None]
        queries = sees.any(2) & real & ~is_sink  # (B, T)
        share = shares(call, lse, keys) * sees[:, None]
        sent = value_updates(share, keys_at(call.v, keys)).double()
        rest = out.double() - sent
        counted = queries[:, None].double()
        norms = {"sent": sent.norm(dim=-1), "rest": rest.norm(dim=-1), "share": share.sum(-1)}
        sums = {name: (row * counted).sum((0, 2)) for name, row in norms.items()}
        value = call.v.double().norm(dim=-1)  # (B, Hkv, S)
        for name, which in (("of sinks", is_sink & real), ("of others", real & ~is_sink)):
            of_heads = (value * which[:, None]).sum((0, 2))[:, None, None]
            sums[name] = repeat_heads(of_heads, call.q.shape[1])[:, 0, 0]
            self.sums.add(f"{name}: tokens", int(which.sum()))
        sent, out = sent * counted[..., None], out.double() * counted[..., None]
        rows = queries.any(1)
        sums["rank"] = effective_ranks(sent[rows]).sum(0)
        sums["output rank"] = effective_ranks(out[rows]).sum(0)
        direction = nn.functional.normalize(sent[rows].sum(2), dim=-1)  # (rows, H, dv)
        sums["directions"] = direction.sum(0)
        for name, total in sums.items():
            self.sums.add(name, total)
        self.sums.add("sequences", int(rows.sum()))
        self.sums.add("queries", int(queries.sum()))

    def _sinks(self, call: Call) -> tuple[Tensor, Tensor]:
        """The positions (B, C) of the sinks, and which of them there are (B, C) bool."""
        rows, _, queries, _ = call.q.shape
        keys = call.k.shape[2]
        assert self.sequences is not None  # a batch has begun
        if keys != queries:
            raise UnsupportedModel(
                f"model: an attention has {queries} queries and {keys} keys, so that its sinks"
                " cannot be located."
            )
        if self.given is None:
            device = call.q.device
            return self.sequences.starts.to(device), self.sequences.present.to(device)
        if max(self.given) >= keys:
            raise BadOption(
                f"sink_tokens: {self.given} in rows of {keys} tokens; give positions below that."
            )
        positions = torch.tensor(self.given, device=call.q.device).expand(rows, -1)
        of = self.sequences.of.to(call.q.device).expand(-1, keys)
        return positions, of.gather(1, positions) >= 0

    def _tokens(self, call: Call, keys: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens (B, T) are sinks, and which are no padding."""
        assert self.sequences is not None  # a batch has begun
        length = call.q.shape[2]
        at = torch.arange(length, device=keys.device)
        is_sink = ((at[:, None] == keys[:, None]) & present[:, None]).any(2)
        real = self.sequences.of.to(keys.device).expand(-1, length) >= 0
        return is_sink, real.expand_as(is_sink)


def effective_ranks(vectors: Tensor) -> Tensor:
    """(B, H, T, d) float64 -> (B, H): the exponential of the entropy of the singular values.

    0 where all vectors are zero. Source: Roy and Vetterli 2007.
    """
    singular = torch.linalg.eigvalsh(vectors.mT @ vectors).clamp(min=0).sqrt()
    total = singular.sum(-1, keepdim=True)
    parts = singular / total.clamp(min=1e-300)
    entropy = -(parts * parts.clamp(min=1e-300).log()).sum(-1)
    return entropy.exp() * (total[..., 0] > 0)


def _heads(layer: int, sums: Sums, limits: tuple[float, float, float]) -> list[HeadSinks]:
    """What one layer's sums come to."""
    queries, sequences = sums["queries"], sums["sequences"]
    of_sinks = sums["of sinks"] / max(1, sums["of sinks: tokens"])
    of_others = sums["of others"] / max(1, sums["of others: tokens"])
    # |sum of n unit vectors|^2 = n + n (n - 1) times their mean cosine
    square = sums["directions"].square().sum(-1)
    alike = (square - sequences) / (sequences * (sequences - 1)) if sequences > 1 else None
    numbers = (
        sums["share"] / queries,
        of_sinks / of_others.clamp(min=1e-30),
        sums["sent"] / sums["rest"].clamp(min=1e-30),
        sums["rank"] / sequences,
        sums["output rank"] / sequences,
    )
    rows = zip(*(number.tolist() for number in numbers), strict=True)
    heads = []
    for head, (share, value, update, rank, output) in enumerate(rows):
        kind = kind_of(share, value, rank, limits)
        cosine = None if alike is None else alike[head].item()
        heads.append(HeadSinks(layer, head, share, value, update, rank, output, cosine, kind))
    return heads
