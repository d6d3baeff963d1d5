"""What `record` must have recorded, from the softmax of every attention written out."""

from __future__ import annotations

import torch

import biassurgery as bs
from tests.models import (
    HEADS,
)

ATTENTION = {
    "gpt2": "attn",
    "mpt": "attn",
    "falcon": "self_attention",
    "falcon_alibi": "self_attention",
    "gpt_neox": "attention",
}


@torch.no_grad()
def recorded(model, what, *args, options=None, **kwargs):
    with bs.record(model, what, **(options or {})) as rec:
        model(*args, **kwargs)
    return rec


def near(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def split(call, columns):
    """(2, B, H, T, dv): what the keys `columns`, (B, T) or an index, give to the output, and the
    rest. Also their share (B, H, T).
    """
    if isinstance(columns, int):
        columns = torch.full(call.probs.shape[:1] + call.probs.shape[2:3], columns)
    chosen = torch.nn.functional.one_hot(columns, call.probs.shape[-1]).bool()[:, None]
    sinks, others = (call.probs.masked_fill(~part, 0) @ call.v for part in (chosen, ~chosen))
    return torch.stack([sinks, others]), call.probs.masked_fill(~chosen, 0).sum(-1)


def check(rec, calls, start, real=None):
    """Everything about attention in one step; `real` (B, T): queries to compare, for those at
    padding mean nothing.
    """
    pick = slice(None) if real is None else real[:, None].expand(-1, HEADS, -1)
    for layer, call in enumerate(calls):
        updates, mass = split(call, start)
        groups = HEADS // rec["k"][layer].shape[1]
        near(rec["q"][layer], call.q)
        near(rec["k"][layer].repeat_interleave(groups, 1), call.k)
        near(rec["v"][layer].repeat_interleave(groups, 1), call.v)
        near(rec["logits"][layer][pick], call.logits[pick], 1e-4)
        near(rec["probs"][layer][pick], call.probs[pick])
        near(rec["sink_mass"][layer][pick], mass[pick])
        for found, wanted in zip(rec["value_updates"][layer], updates):
            near(found[pick], wanted[pick], 2e-4)
        assert rec["bias_mass"][layer].abs().max() == 0
        near(rec["lse"][layer][pick], call.logits.logsumexp(-1)[pick], 1e-4)


ABOUT_ATTENTION = (
    "q",
    "k",
    "v",
    "logits",
    "probs",
    "sink_mass",
    "value_updates",
    "bias_mass",
    "lse",
)
