"""Attention sinks, and how they overlap with massive activations: a statistic of `detect`.

A token k is a sink of a head if the mean over the queries t >= k of its sequence of the attention
A[t, k] exceeds epsilon (Gu et al. 2025, "When Attention Sink Emerges in Language Models", section
3.2). docs/sinks.md has all formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.offloaded import hollow
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.findings.sinks import LayerSinks, Sinks
from biassurgery.findings.sums import Sums
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.kept import rows_of
from biassurgery.measure.layer_sinks import Marked, OfKeys, SinkEdit
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.reading import reading
from biassurgery.measure.sequences import Sequences
from biassurgery.measure.statistic import BlockOutput, Statistic
from biassurgery.surgery.edit import Place, attached

EPSILON = 0.3  # Gu et al. 2025


class SinkStatistic(Statistic):
    """An edit that changes nothing on the attention of every layer that attends.

    Args:
        host: the model.
        candidates: tells which tokens may hold massive activations.
        epsilon: mean attention above which a token is a sink.

    Raises:
        UnsupportedModel: the attention of a layer does not go through this library's core, or is
            shared with another layer.
    """

    name = "sinks"
    in_batch = ()

    def __init__(self, host: Host, candidates: Candidates, epsilon: float = EPSILON) -> None:
        super().__init__(host)
        self.candidates = candidates
        self.epsilon = epsilon
        self.images = host.adapter.modality == "image"
        self.attentions = attentions(host)
        roles = host.roles if self.images else ()
        behind = host.adapter.behind(host.model) if self.images else 0
        self.edits = {
            layer: SinkEdit(layer, attention.route, roles, epsilon, self.totals, behind)
            for layer, attention in self.attentions.items()
        }

    def places(self) -> list[Place]:
        return [
            attention.place(layer, self.edits[layer])
            for layer, attention in self.attentions.items()
        ]

    def begin(self, batch: Mapping[str, Any]) -> None:
        sequences = Sequences.read(self.host, batch)
        for edit in self.edits.values():
            edit.sequences = sequences
            edit.marked = None

    def see(self, output: BlockOutput) -> None:
        """Tell the next attention which tokens of its input may hold massive activations."""
        # Blocks in between may not run, or keep a state instead.
        edit = next((edit for layer, edit in self.edits.items() if layer > output.layer), None)
        if edit is not None:
            found = self.candidates.of(output)
            edit.marked = Marked.of(found, output.real.shape) if len(found.key) else None

    def suspend(self) -> dict[int, Any]:
        marked = {layer: edit.marked for layer, edit in self.edits.items()}
        return {layer: tuple(tokens) for layer, tokens in marked.items() if tokens is not None}

    def resume(self, known: Mapping[int, Any]) -> None:
        for layer, tokens in known.items():
            self.edits[layer].marked = Marked(*tokens)

    def __add__(self, other: Statistic) -> SinkStatistic:
        assert isinstance(other, SinkStatistic)
        both = super().__add__(other)
        assert isinstance(both, SinkStatistic)
        both.candidates = self.candidates + other.candidates
        return both

    def state(self) -> Any:
        return {
            (layer, tuple(name) if isinstance(name, OfKeys) else name): total
            for (layer, name), total in self.totals.items()
        }

    def restore(self, state: Any) -> None:
        self.totals.restore(  # the same object, for the edits add to it
            {
                (layer, OfKeys(*name) if isinstance(name, tuple) else name): total
                for (layer, name), total in state.items()
            }
        )

    def result(self) -> Sinks:
        first = min(self.edits)
        every_layer = range(len(self.host.blocks))
        massive = self.candidates.massive.massive_keys()
        return Sinks(
            tuple(self._layer(layer, massive) for layer in self.edits),
            self.epsilon,
            self.totals[first, "sequences"],
            self.totals[first, "others"],
            tuple(layer for layer in every_layer if layer not in self.edits),
        )

    def _layer(self, layer: int, massive: Set[int]) -> LayerSinks:
        totals = Sums()
        for (at, name), total in self.totals.items():
            if at == layer and isinstance(name, str):
                totals.add(name, total)
            elif at == layer and not massive.isdisjoint(name.keys):
                totals.add(name.name, total)
        sequences = totals["sequences"]
        with_others = totals["sequences with others"]
        massive_tokens = totals.get("massive tokens", 0)
        nothing = torch.zeros_like(totals["attention"])
        on_start = totals["attention"].sum().item()
        on_massive_start = totals.get("start_on_massive", nothing).sum().item()
        massive_sinks = _mean(totals.get("massive_sink", nothing), massive_tokens)
        roles = self.host.roles if self.images else ()
        return LayerSinks(
            layer,
            attention=_mean(totals["attention"], with_others),
            sink=_mean(totals["sink"], sequences),
            on_massive=_mean(totals.get("on_massive", nothing), with_others),
            massive_tokens=massive_tokens,
            massive_sinks=(
                sum(massive_sinks) / len(massive_sinks) if massive_tokens else float("nan")
            ),
            start_massive=on_massive_start / on_start if on_start else 0.0,
            roles={role: _mean(totals[f"role {role}"], sequences) for role in roles},
        )


def reason_against(host: Host, batch: dict[str, Any]) -> str:
    """Why this model's sinks cannot be measured, by a run of a batch's first rows; or empty.

    Weights that are elsewhere are not read for it: the run tells by which code attention goes.
    """
    batch = rows_of(batch, range(2))
    try:
        statistic = SinkStatistic(host, Candidates(MassiveActivations(host)))
        with reading(host.model), attached(statistic.places()), hollow(host.root):
            statistic.begin(batch)
            host.adapter.run(host.model, batch)
    except UnsupportedModel as error:
        return str(error)
    silent = [layer for layer in statistic.edits if (layer, "attention") not in statistic.totals]
    if silent:
        return f"model: the attention of layers {silent} did not reach this library's core."
    return ""


def _mean(total: Tensor, count: int) -> tuple[float, ...]:
    return tuple((total / max(count, 1)).tolist())
