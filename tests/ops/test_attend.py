"""The attention core against a float64 softmax written out here: outputs, log-sum-exp and gradients
of every path.
"""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from biassurgery.ops.dense import dense
from biassurgery.ops.fused import fused
from biassurgery.ops.kernels import KERNELS
from tests.ops.plain_attention import DEVICES, TOLERANCE, Case, close, make, make_columns, oracle

MASKS = (
    "none",
    "causal",
    "bool",
    "float",
    "window",
    "left_padding",
    "causal_and_bool",
    "lowest",
    "blind",
    "one_dimension",
)


def agrees(path, case: Case, columns: Columns | None, **options) -> None:
    """Output, log-sum-exp and every gradient of `path` are the oracle's."""
    tolerance = TOLERANCE[case.q.dtype]
    scale = 1 / math.sqrt(case.q.shape[-1])
    out, lse = path(
        case.q,
        case.k,
        case.v,
        mask=case.mask,
        causal=case.causal,
        scale=scale,
        columns=columns,
        **options,
    )
    expected, expected_lse = oracle(case, columns, **options)
    assert out.dtype == case.q.dtype
    assert lse.dtype == (torch.float64 if case.q.dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    close(out, expected, tolerance)
    seen = expected_lse > -1e30
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    # Only the sums are rounded: float32 whatever the inputs, which both sides share.
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=1e-5, atol=1e-5)
    weight = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).to(out)
    # Beside a mask's lowest number a sum of exponentials is lost to rounding, in torch's own
    # kernels too: no gradient to compare.
    weight = weight * seen.logical_or(expected_lse == -math.inf).unsqueeze(-1)
    leaves = [x for x in (case.q, case.k, case.v, *(columns or ())) if x is not None]
    got = torch.autograd.grad(out, leaves, weight)
    wanted = torch.autograd.grad(expected, leaves, weight.double())
    for one, other in zip(got, wanted):
        close(one, other, 3 * tolerance)
    with torch.no_grad():
        plain, plain_lse = path(
            case.q,
            case.k,
            case.v,
            mask=case.mask,
            causal=case.causal,
            scale=scale,
            columns=columns,
            **options,
        )
    assert torch.equal(plain, out)
    assert torch.equal(plain_lse, lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [attend, fused, dense])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_mask_and_dtype_with_and_without_columns(
    mask: str, dtype: torch.dtype, path, device: str
) -> None:
    if device == "cuda" and path is fused and dtype == torch.float64:
        path = attend  # no CUDA kernel takes float64
    case = make(mask, dtype=dtype, device=device)
    for columns in (None, make_columns(case, 1), make_columns(case, 3)):
        agrees(path, case, columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [fused, dense])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 11), (11, 11), (7, 3), (40, 600)])
@pytest.mark.parametrize("mask", ["none", "causal", "left_padding"])
def test_lengths(mask: str, queries: int, keys: int, path, device: str) -> None:
    if keys < queries and mask == "left_padding":
        keys = queries
    case = make(mask, queries=queries, keys=keys, dtype=torch.float32, device=device)
    agrees(path, case, make_columns(case, 1))
    agrees(path, case, None)


def repeated(*args, **options):
    """`fused` with a kernel that takes as many key-value heads as query heads: those of CUDA, that
    of the CPU before torch 2.9.
    """
    with patch.dict(KERNELS, cpu=KERNELS["cpu"]._replace(grouped=False)):
        return fused(*args, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [fused, repeated, dense])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int], path, device: str) -> None:
    for mask, columns_of in itertools.product(("causal", "bool"), set(heads)):
        case = make(mask, heads=heads, dtype=torch.float32, device=device)
        agrees(path, case, make_columns(case, 2, heads=columns_of, logit=(2,)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [fused, dense])
@pytest.mark.parametrize("parts", ["", "k", "v", "kv"])
@pytest.mark.parametrize("logit", [(1,), (4, 1, 1), (2, 4, 1, 1), (2, 4, 7, 1), (7, 1)], ids=str)
def test_each_part_of_a_column(parts: str, logit: tuple[int, ...], path, device: str) -> None:
    case = make("causal", dtype=torch.float32, device=device)
    agrees(path, case, make_columns(case, 1, parts, logit=logit))


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("mask", ["none", "causal", "left_padding", "blind"])
def test_gradients_are_those_of_finite_differences(mask: str, columns: int | None) -> None:
    case = make(mask, queries=3, keys=4, heads=(2, 1), size=3)
    extra = () if columns is None else make_columns(case, columns, heads=2, logit=(2, 1, columns))

    def out(*inputs: Tensor) -> Tensor:
        q, k, v, *rest = inputs
        return attend(
            q, k, v, mask=case.mask, causal=case.causal, columns=Columns(*rest) if rest else None
        )[0]

    assert torch.autograd.gradcheck(out, (case.q, case.k, case.v, *extra))


@pytest.mark.parametrize("mask", ["causal", "left_padding", "blind"])
def test_softcap_bends_the_keys_and_not_the_columns(mask: str) -> None:
    case = make(mask)
    columns = make_columns(case, 2)
    agrees(attend, case, columns, softcap=0.7)
    agrees(attend, case, None, softcap=0.7)
    capped = attend(case.q, case.k, case.v, mask=case.mask, softcap=0.7)[0]
    assert (capped - attend(case.q, case.k, case.v, mask=case.mask)[0]).abs().max() > 0.01


@pytest.mark.parametrize("path", [attend, dense])
def test_values_of_another_size(path) -> None:
    case = make("left_padding")
    case = case._replace(v=torch.randn(2, 2, 11, 6, dtype=torch.float64, requires_grad=True))
    columns = make_columns(case, 1)._replace(
        value=torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)
    )
    agrees(path, case, columns)
