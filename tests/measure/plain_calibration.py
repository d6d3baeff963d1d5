"""The definition of sites as plain loops, and batches of text of every kind."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from tests import models
from tests.models import HIDDEN, LAYERS

Batch = dict[str, Tensor]


@dataclass
class Plain:
    """What a loop finds: the values that meet the definition, all magnitudes of their channel, and
    the median magnitudes.
    """

    hits: dict[tuple[int, int, str], list[float]] = field(default_factory=dict)
    others: dict[tuple[int, int], float] = field(default_factory=dict)
    medians: list[float] = field(default_factory=lambda: [0.0] * LAYERS)
    sequences: int = 0
    tokens: int = 0


def plain(
    model: Any,
    family: str,
    batches: list[Batch],
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
) -> Plain:
    """One sequence, one layer, one sort at a time."""
    found = Plain()
    for batch in batches:
        hidden = hidden_states(model, family, batch)
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row in range(ids.shape[0]):
            tokens = [t for t in range(ids.shape[1]) if real[row, t]]
            found.sequences += bool(tokens)
            found.tokens += len(tokens)
            if not tokens:
                continue
            starts = {tokens[0]}
            if "position_ids" in batch:
                starts |= {t for t in tokens if batch["position_ids"][row, t] == 0}
            for layer in range(LAYERS):
                values = hidden[layer][row, tokens].double()
                median = statistics.median_low(values.abs().flatten().tolist())
                found.medians[layer] += median
                massive = (values.abs() > min_magnitude) & (values.abs() > min_ratio * median)
                for token, channel in massive.nonzero().tolist():
                    role = "start" if tokens[token] in starts else "elsewhere"
                    found.hits.setdefault((layer, channel, role), []).append(
                        values[token, channel].item()
                    )
                rest = values.abs().masked_fill(massive, 0).amax(0).tolist()
                for channel in range(HIDDEN):
                    found.others[layer, channel] = max(
                        found.others.get((layer, channel), 0.0), rest[channel]
                    )
    return found


@torch.no_grad()
def hidden_states(model: nn.Module, family: str, batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
        for block in models.blocks(model, family)
    ]
    model(**batch, use_cache=False)  # with a cache, packed documents would see each other
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS
    return seen


def check(sites: bs.Sites, wanted: Plain) -> None:
    """That sites are what the loop found, where massive and ordinary values are far apart."""
    assert wanted.hits
    assert {(s.layer, s.channel, s.role) for s in sites} == set(wanted.hits)
    for site in sites:
        values = wanted.hits[site.layer, site.channel, site.role]
        other = wanted.others[site.layer, site.channel]
        smallest = min(
            abs(x)
            for place, found in wanted.hits.items()
            for x in found
            if place[:2] == (site.layer, site.channel)
        )
        assert site.cluster == 0
        assert site.count == len(values)
        assert site.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
        assert site.std == pytest.approx(statistics.pstdev(values), rel=1e-9, abs=1e-9)
        assert site.gate is not None
        assert other < site.gate < smallest
        assert site.margin == pytest.approx(smallest / other, rel=1e-6)
    assert sites.tally is not None
    assert (sites.tally.sequences, sites.tally.tokens) == (wanted.sequences, wanted.tokens)
    assert sites.tally.medians.tolist() == pytest.approx(
        wanted.medians, rel=1e-7
    )  # a float64 model is read as float32
