"""`attend` under torch.compile, checkpointing and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from tests.ops.plain_attention import DEVICES, make, make_columns


@pytest.mark.parametrize("mask", ["causal", "left_padding"])
def test_compiled_whole_forward_and_backward(mask: str) -> None:
    case = make(mask, dtype=torch.float32, heads=(4, 2))
    columns = make_columns(case, 1, heads=2)

    def loss(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(q * 2, k, v, mask=mask, causal=case.causal, columns=columns)
        return out.square().sum(), lse

    inputs = (*case[:4], columns)
    leaves = (*case[:3], *columns)
    expected, expected_lse = loss(*inputs)
    got, lse = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(lse, expected_lse)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)(*inputs)[0],
            expected,
        )


def test_compiled_by_inductor() -> None:
    case = make("left_padding", dtype=torch.float32)
    columns = make_columns(case, 1)
    compiled = torch.compile(
        lambda *x: attend(*x[:3], mask=case.mask, columns=Columns(*x[3:]))[0], fullgraph=True
    )
    leaves = (*case[:3], *columns)
    got = compiled(*leaves)
    expected = attend(*case[:3], mask=case.mask, columns=columns)[0]
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    case = make("left_padding", dtype=torch.float32)
    columns = make_columns(case, 1)

    def out(q: Tensor, k: Tensor, v: Tensor, *columns: Tensor) -> Tensor:
        return attend(q, k, v, mask=case.mask, columns=Columns(*columns))[0]

    leaves = (*case[:3], *columns)
    wanted = torch.autograd.grad(out(*leaves).square().sum(), leaves)
    checkpoint(out, *leaves, use_reentrant=reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, wanted):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autocast_is_that_of_torch(softcap: float | None, device: str) -> None:
    case = make("left_padding", dtype=torch.float32, device=device)
    columns = make_columns(case, 1)
    half = [x.detach().bfloat16().requires_grad_() for x in case[:3]]
    expected, expected_lse = attend(*half, mask=case.mask, columns=columns, softcap=softcap)
    with torch.autocast(device, torch.bfloat16):
        out, lse = attend(*case[:3], mask=case.mask, columns=columns, softcap=softcap)
        torchs = functional.scaled_dot_product_attention(*case[:3], enable_gqa=True)
    # torch itself lowers the matrix products of a backward inside autocast; that of the fused path
    # is the same anywhere.
    with torch.autocast(device, torch.bfloat16, enabled=softcap is None):
        gradients = torch.autograd.grad(out.float().sum(), (*case[:3], *columns))
    assert out.dtype == torchs.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    wanted = torch.autograd.grad(expected.float().sum(), (*half, *columns))
    for one, other in zip(gradients, wanted):
        assert torch.equal(one, other.to(one.dtype))
