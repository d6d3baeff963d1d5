"""`value_life`: a massive activation from the weight that writes it to the attention it draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import PADDING
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, NoSites, UnsupportedModel
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.finding import check_fits
from biassurgery.findings.site import Site
from biassurgery.findings.value_life import LifeInBlock, ValueLife
from biassurgery.measure.layer_sinks import mean_weights
from biassurgery.measure.observe import observed
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.sequences import Sequences
from biassurgery.measure.state_sums import Running
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import attached
from biassurgery.surgery.shares import shares


def value_life(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    diagnosis: Diagnosis,
    site: Site | None = None,
    *,
    start: Start = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    tower: Tower | None = None,
) -> ValueLife:
    """Follow one massive activation through the model: who writes it, how large, who looks at it.

    Of each sequence the token is followed that has the largest value of the site's channel and role
    where it is born; sequences without one count for nothing. Each batch is run twice, once for the
    values and once for the attention; memory is O(T) a block.

    Args:
        model: a model of a supported architecture.
        batches: see `detect`.
        diagnosis: of the same model, by `diagnose(model, batches)`: its sites, and the weights that
            write them.
        site: one of `diagnosis.sites`; None: the largest of those where values are born.
        start: a token to put in front of every sequence, see `calibrate`.
        tokenizer: the model's, where `start` is a token.
        progress: show a progress bar; None: only on a terminal.
        tower: `vision` (default) or `text`, of a model that has both.

    Raises:
        NoSites: the diagnosis found no massive activations.
        BadBatch: none of these sequences has the value.
        BadOption: a site that the diagnosis has not.
        NonFiniteActivation: see its message.
        Incompatible: the diagnosis is of another model.
    """
    host = find_host(model, tower)
    check_fits("diagnosis", diagnosis.measured_on, host.facts, "diagnose this model")
    chosen = _chosen(diagnosis, site)
    life = _Life(host, chosen)
    front = start_id(host, start, tokenizer)
    with reading(host.model):
        for batch in with_bar(
            behind_start(host, as_batches(host, batches), front), "life of a value", progress
        ):
            life.read(batch)
    if not life.carriers:
        raise BadBatch(
            f"batches: no sequence has the value of channel {chosen.channel}, role {chosen.role},"
            " at block"
            f" {chosen.layer}; give those that the diagnosis was made on."
        )
    weights = tuple(one for one in diagnosis.super_weights if one.row == chosen.channel)
    return ValueLife(chosen, weights, life.blocks(), life.carriers, life.sequences)


def _chosen(diagnosis: Diagnosis, site: Site | None) -> Site:
    if site is not None:
        if site not in list(diagnosis.sites):
            raise BadOption(f"site: {site!r} is none of diagnosis.sites; give one of them.")
        return site
    born = [one for one in diagnosis.sites if one.first] or list(diagnosis.sites)
    if not born:
        raise NoSites(
            "diagnosis: it found no massive activations, so there is none to follow; detect() shows"
            " what comes nearest."
        )
    return max(born, key=lambda one: abs(one.mean))


class _Life:
    """Sums over the batches: by block the values, and the attention of each head (H,)."""

    def __init__(self, host: Host, site: Site) -> None:
        self.host = host
        self.site = site
        self.carriers = 0
        self.sequences = 0
        self._values: dict[int, Running] = {}
        self._others: dict[int, list[float]] = {}
        self._attention: dict[int, Tensor] = {}
        self._seen_by = 0  # carriers that other tokens see
        try:
            self._attentions = attentions(host)
        except UnsupportedModel:  # its values can be followed all the same
            self._attentions = {}

    def read(self, batch: dict[str, Any]) -> None:
        columns: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> None:
            columns[layer] = hidden[..., self.site.channel].detach().cpu().double()

        with observed(self.host, keep):
            self.host.adapter.run(self.host.model, batch)
        born = columns[self.site.layer]
        roles = self.host.adapter.token_roles(self.host.model, batch, (len(born), born.shape[1]))
        self._check_finite(columns, roles.cpu() != PADDING)
        at, present = self._places(born, roles.cpu())
        self.carriers += int(present.sum())
        self.sequences += len(at)
        others = (roles.cpu() != PADDING) & (born.abs() <= self._gate)
        self._add_values(columns, others, at, present)
        if self._attentions and present.any():
            self._add_attention(batch, at, present)

    def _check_finite(self, columns: Mapping[int, Tensor], real: Tensor) -> None:
        for layer, column in sorted(columns.items()):
            if not column[real].isfinite().all():
                raise NonFiniteActivation(
                    f"batches: the output of block {layer} holds NaN or infinity in channel"
                    f" {self.site.channel}; {what_to_do(self.host)}."
                )

    def _places(self, born: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) where the value is in each row, and whether it is there."""
        theirs = born.abs().masked_fill(roles != self.host.roles.index(self.site.role), 0)
        largest, at = theirs.max(1)
        return at, largest > self._gate

    @property
    def _gate(self) -> float:
        return abs(self.site.mean) / 2 if self.site.gate is None else self.site.gate

    def _add_values(
        self, columns: Mapping[int, Tensor], others: Tensor, at: Tensor, present: Tensor
    ) -> None:
        for layer, column in columns.items():
            running = self._values.setdefault(layer, Running())
            for value in column.gather(1, at[:, None])[present, 0].tolist():
                running.add(value)
            sums = self._others.setdefault(layer, [0.0, 0.0])
            sums[0] += column.abs()[others].sum().item()
            sums[1] += others.sum().item()

    def _add_attention(self, batch: dict[str, Any], at: Tensor, present: Tensor) -> None:
        sequences = Sequences.read(self.host, batch)
        edits = {
            layer: _OnCarriers(attention.route, sequences, at[present], present)
            for layer, attention in self._attentions.items()
        }
        places = [one.place(layer, edits[layer]) for layer, one in self._attentions.items()]
        with attached(places):
            self.host.adapter.run(self.host.model, batch)
        for layer, edit in edits.items():
            if edit.received is not None:
                self._attention[layer] = self._attention.get(layer, 0) + edit.received
        self._seen_by += next((edit.seen for edit in edits.values()), 0)

    def blocks(self) -> tuple[LifeInBlock, ...]:
        rows = []
        for layer, running in sorted(self._values.items()):
            total, count = self._others[layer]
            shares = self._attention.get(layer)
            mean = strongest = None
            if shares is not None and self._seen_by:
                heads = shares / self._seen_by
                mean, strongest = heads.mean().item(), heads.max().item()
            rows.append(
                LifeInBlock(
                    layer,
                    float(running.mean),
                    float(running.variance) ** 0.5,
                    total / max(1.0, count),
                    mean,
                    strongest,
                )
            )
        return tuple(rows)


class _OnCarriers(AttentionEdit):
    """The attention of each head on one token a row, mean over the others that see it.

    Attributes:
        received: (H,) float64, summed over rows; None: the attention has not run.
        seen: how many of the tokens others see.
    """

    child = "value_life"

    def __init__(
        self, route: type[EditedAttention], sequences: Sequences, at: Tensor, present: Tensor
    ) -> None:
        super().__init__()
        self.route = route
        self.sequences = sequences
        self.at = at
        self.present = present
        self.received: Tensor | None = None
        self.seen = 0

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        length = call.q.shape[2]
        if call.k.shape[2] != length:
            raise UnsupportedModel(
                f"model: an attention has {length} queries and {call.k.shape[2]} keys, so that the"
                " token that carries the value cannot be located."
            )
        keys = torch.zeros(len(self.present), 1, dtype=torch.int64)
        keys[self.present, 0] = self.at
        keys = keys.to(call.q.device)
        itself = torch.arange(length, device=keys.device)[:, None] == keys[:, None]
        there = self.present.to(keys.device)[:, None, None]
        others = self.sequences.queries(keys, length) & ~itself & there  # (B, T, 1)
        share = shares(call, lse, keys)[..., 0].double()  # (B, H, T)
        weights = mean_weights(others)[:, None, :, 0].double()
        self.received = (share * weights).sum((0, 2)).cpu()
        self.seen = int(others.any(1).sum())
