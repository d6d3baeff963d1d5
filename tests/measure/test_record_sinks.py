"""Sink tokens as `record` counts them."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption
from tests.models import planted, tokens


@torch.no_grad()
def test_sinks_are_recorded_where_a_sink_cache_keeps_them():
    model = planted("llama")
    ids = tokens(1, 20)
    for sinks in (0, 2):
        cache = bs.SinkCache(model, 8, sinks=sinks)
        with bs.record(model, ("sink_mass", "probs")) as rec:
            for token in ids.split(1, 1):
                model(token, past_key_values=cache)
        for layer in range(5):
            first = rec["probs"][layer][..., 0] if sinks else torch.zeros(1, 4, 1)
            torch.testing.assert_close(rec["sink_mass"][layer], first, rtol=1e-5, atol=1e-6)
    assert rec["sink_mass"][0].sum() > 0


@torch.no_grad()
def test_a_token_named_twice_counts_once():
    model = planted("llama")
    with bs.record(model, "sink_mass", sink_tokens=(0, 0, 3)) as rec:
        model(tokens())
    with bs.record(model, "sink_mass", sink_tokens=(0, 3)) as once:
        model(tokens())
    assert torch.equal(rec["sink_mass"][2], once["sink_mass"][2])
    with pytest.raises(BadOption, match="layers"):
        rec["sink_mass"][9]
