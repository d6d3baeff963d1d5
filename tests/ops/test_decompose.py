"""Shares of attention and value updates against the whole softmax matrix, written out in
float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from biassurgery.ops.decompose import attention_logits, bias_mass, key_probs, value_updates

QUERIES = 6
KEYS = 9
SIZE = 8
VISIBLE = torch.arange(KEYS) <= torch.arange(QUERIES)[:, None] + KEYS - QUERIES


def make(
    dtype: torch.dtype = torch.float64, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Columns]:
    q = torch.randn(2, 4, QUERIES, SIZE, dtype=dtype)
    k = torch.randn(2, kv_heads, KEYS, SIZE, dtype=dtype)
    v = torch.randn(2, kv_heads, KEYS, SIZE, dtype=dtype)
    columns = Columns(
        torch.randn(4, 1, 2),
        torch.randn(kv_heads, 2, SIZE, dtype=dtype),
        torch.randn(4, 2, SIZE, dtype=dtype),
    )
    return q, k, v, columns


def whole(
    q: Tensor, k: Tensor, columns: Columns, visible: Tensor = VISIBLE, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """All key logits (masked ones -inf) and all probabilities, the two columns last, head by
    head.
    """
    logits = []
    probs = []
    for head in range(4):
        kv = head // (4 // k.shape[1])
        keys = torch.einsum("btd,bsd->bts", q[:, head].double(), k[:, kv].double()) / math.sqrt(
            SIZE
        )
        keys = keys if softcap is None else softcap * torch.tanh(keys / softcap)
        keys = torch.where(visible, keys, -math.inf)
        extra = (
            torch.einsum("btd,nd->btn", q[:, head].double(), columns.key[kv].double())
            / math.sqrt(SIZE)
            + columns.logit[head].double()
        )
        logits.append(keys)
        probs.append(torch.cat([keys, extra], -1).softmax(-1))
    return torch.stack(logits, 1), torch.stack(probs, 1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-5)],
    ids=str,
)
def test_logits_shares_and_mass_are_those_of_the_matrix(
    dtype: torch.dtype, tolerance: float, softcap: float | None
) -> None:
    q, k, v, columns = make(dtype)
    logits, probs = whole(q, k, columns, softcap=softcap)
    got = attention_logits(q, k, causal=True, softcap=softcap)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(attention_logits(q, k, mask=VISIBLE, softcap=softcap), got)

    _, lse = attend(q, k, v, causal=True, columns=columns, softcap=softcap)
    chosen = [0, 4, 7]
    shares = key_probs(q, k[:, :, chosen], lse, mask_c=VISIBLE[:, chosen], softcap=softcap)
    torch.testing.assert_close(shares.double(), probs[..., chosen], rtol=tolerance, atol=tolerance)
    mass = bias_mass(q, columns, lse)
    assert mass.min() > 0
    torch.testing.assert_close(
        mass.double(), probs[..., KEYS:].sum(-1), rtol=tolerance, atol=tolerance
    )
    everything = key_probs(q, k, lse, mask_c=VISIBLE, softcap=softcap).sum(-1) + mass
    torch.testing.assert_close(
        everything, torch.ones_like(mass), rtol=tolerance, atol=10 * tolerance
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_two_parts_make_the_attention_output(kv_heads: int) -> None:
    q, k, v, columns = make(kv_heads=kv_heads)
    out, lse = attend(q, k, v, causal=True, columns=columns)
    few = [0, 2]
    rest = [1, 3, 4, 5, 6, 7, 8]
    first, second = (
        value_updates(key_probs(q, k[:, :, at], lse, mask_c=VISIBLE[:, at]), v[:, :, at])
        for at in (few, rest)
    )
    from_columns = torch.einsum(
        "bhtn,hnd->bhtd", whole(q, k, columns)[1][..., KEYS:], columns.value
    )
    torch.testing.assert_close(first + second + from_columns, out, rtol=1e-12, atol=1e-12)
    assert first.abs().max() > 0.1
    _, probs = whole(q, k, columns)
    expected = sum(
        probs[..., i, None] * v.repeat_interleave(4 // kv_heads, 1)[:, :, i, None] for i in few
    )
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_nothing_shares_nothing() -> None:
    q, k, v, _ = make()
    mask = VISIBLE.clone()
    mask[2] = False
    _, lse = attend(q, k, v, mask=mask)
    shares = key_probs(q, k[:, :, :2], lse, mask_c=mask[:, :2])
    assert not shares[:, :, 2].any()
    assert (shares[:, :, 3] > 0).all()


def test_scale_is_the_callers() -> None:
    q, k, v, columns = make()
    _, lse = attend(q, k, v, scale=1.0, columns=columns)
    total = key_probs(q, k, lse, 1.0).sum(-1) + bias_mass(q, columns, lse, 1.0)
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(
        attention_logits(q, k, scale=1.0), attention_logits(q, k) * math.sqrt(SIZE)
    )
