"""Inputs of attention with every kind of mask, and softmax attention with columns in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from biassurgery.ops.columns import Columns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool


def make(
    mask: str = "none",
    *,
    queries: int = 7,
    keys: int = 11,
    heads: tuple[int, int] = (4, 2),
    dtype=torch.float64,
    device="cpu",
    size=16,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            .to(device, dtype)
            .requires_grad_()
        )

    q = normal(2, heads[0], queries, size)
    k = normal(2, heads[1], keys, size)
    v = normal(2, heads[1], keys, size)
    at = torch.arange(keys) - (
        keys - queries + torch.arange(queries)[:, None]
    )  # key position from the query's own
    some = torch.rand(2, 1, queries, keys, generator=generator) > 0.4
    some[..., 0] = True
    padded = torch.arange(keys) >= torch.tensor([0, 3]).view(2, 1, 1, 1)
    hidden = some.clone()
    hidden[1, 0, queries // 2] = False
    masks = {
        "none": None,
        "causal": None,
        "bool": some,
        "float": torch.randn(1, heads[0], queries, keys, generator=generator).to(dtype),
        "window": (at <= 0) & (at > -3),
        "left_padding": (at <= 0) & padded,
        "causal_and_bool": some,
        "lowest": torch.zeros(some.shape, dtype=dtype).masked_fill(~hidden, torch.finfo(dtype).min),
        "blind": torch.zeros(some.shape).masked_fill(~hidden, -math.inf),
        "one_dimension": padded[1, 0, 0],
    }
    chosen = masks[mask]
    return Case(
        q,
        k,
        v,
        None if chosen is None else chosen.to(device),
        mask in ("causal", "causal_and_bool"),
    )


def make_columns(
    case: Case, count: int, parts: str = "kv", heads: int = 4, logit: tuple[int, ...] | None = None
) -> Columns:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            .to(case.q)
            .detach()
            .requires_grad_()
        )

    size = case.q.shape[-1]
    key = normal(heads, count, size)
    value = normal(heads, count, size)
    return Columns(
        normal(*(logit or (4, 1, count))),
        key if "k" in parts else None,
        value if "v" in parts else None,
    )


def oracle(
    case: Case, columns: Columns | None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every step in float64, every masked logit -inf, loops over nothing but heads' groups."""
    q, k, v = (x.double() for x in case[:3])
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    values = v.repeat_interleave(group, 1)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if case.mask is not None:
        logits = (
            logits.masked_fill(~case.mask, -math.inf)
            if case.mask.dtype == torch.bool
            else logits + case.mask.double()
        )
    if case.causal:
        queries, keys = logits.shape[-2:]
        late = torch.tensor(
            [[s > keys - queries + t for s in range(keys)] for t in range(queries)], device=q.device
        )
        logits = logits.masked_fill(late, -math.inf)
    if columns is not None:
        logit, key, value = (None if x is None else x.double() for x in columns)
        count = next((x.shape[1] for x in (key, value) if x is not None), logit.shape[-1])
        extra = logit.expand(*q.shape[:3], count)
        if key is not None:
            key = key.repeat_interleave(q.shape[1] // key.shape[0], 0)
            extra = extra + torch.einsum("bhtd,hnd->bhtn", q, key) / math.sqrt(q.shape[-1])
        logits = torch.cat([logits, extra], -1)
        if value is None:
            value = values.new_zeros(q.shape[1], count, values.shape[-1])
        value = value.repeat_interleave(q.shape[1] // value.shape[0], 0)
        values = torch.cat([values, value.expand(q.shape[0], -1, -1, -1)], 2)
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min).detach()
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights / total.masked_fill(total == 0, 1) @ values
    return out, (top + total.log()).squeeze(-1).detach()


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(
        got.double(),
        wanted.double(),
        rtol=tolerance,
        atol=tolerance * max(1.0, wanted.abs().max().item() / 4),
    )
