"""The attention core against a float64 softmax written out here: outputs, log-sum-exp and gradients
of every path.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from biassurgery.errors import BadOption
from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns, column_logits
from biassurgery.ops.dense import dense
from biassurgery.ops.fused import fused
from biassurgery.ops.kernels import KERNELS

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
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


def test_a_learned_mask_gets_its_gradient() -> None:
    case = make("float")
    learned = case.mask.detach().requires_grad_()
    weight = torch.randn_like(case.q)
    (got,) = torch.autograd.grad(attend(case.q, case.k, case.v, mask=learned)[0], learned, weight)
    (wanted,) = torch.autograd.grad(oracle(case._replace(mask=learned), None)[0], learned, weight)
    assert wanted.abs().max() > 0.01
    close(got, wanted, 1e-12)


def test_a_query_that_sees_nothing() -> None:
    case = make("blind")
    row = (1, slice(None), 3)
    out, lse = attend(case.q, case.k, case.v, mask=case.mask)
    assert torch.equal(out[row], torch.zeros_like(out[row]))
    assert (lse[row] == -math.inf).all()
    columns = make_columns(case, 1)
    out, lse = attend(case.q, case.k, case.v, mask=case.mask, columns=columns)
    close(out[row], columns.value[:, 0], 1e-12)
    close(lse[row], column_logits(case.q, columns, 0.25)[row][:, 0], 1e-12)


@pytest.mark.parametrize("path", [fused, dense])
def test_a_column_that_is_switched_off_changes_nothing(path) -> None:
    case = make("blind", dtype=torch.float32)
    columns = make_columns(case, 1)._replace(logit=torch.tensor([-math.inf]))
    out, lse = path(case.q, case.k, case.v, mask=case.mask, scale=0.25, columns=columns)
    plain, plain_lse = path(case.q, case.k, case.v, mask=case.mask, scale=0.25)
    close(out, plain, 1e-6)
    torch.testing.assert_close(lse, plain_lse)
    assert all(
        x.isfinite().all()
        for x in torch.autograd.grad(out.sum(), (*case[:3], columns.key, columns.value))
    )


def test_keys_may_be_absent() -> None:
    case = make(keys=11)
    k = case.k[:, :, :0]
    v = case.v[:, :, :0]
    columns = make_columns(case, 1, heads=4)
    out, _ = attend(case.q, k, v, columns=columns)
    close(out, columns.value.expand_as(out), 1e-12)
    assert not attend(case.q, k, v, causal=True)[0].any()


def test_large_logits_stay_finite() -> None:
    case = make("causal", dtype=torch.float32)
    case = case._replace(q=(case.q * 300).detach().requires_grad_())
    columns = make_columns(case, 1)
    for path in (fused, dense):
        out, lse = path(case.q, case.k, case.v, causal=True, scale=1.0, columns=columns)
        gradients = torch.autograd.grad(out.sum(), (*case[:3], *columns))
        assert all(x.isfinite().all() for x in (out, lse, *gradients))


def test_strided_inputs() -> None:
    case = make("bool")
    columns = make_columns(case, 1)
    expected = attend(*case[:3], mask=case.mask, columns=columns)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:3]]
    turned = [x.mT.contiguous().mT for x in case[:3]]
    for inputs in (swapped, turned):
        for got, wanted in zip(
            attend(*inputs, mask=case.mask.mT.contiguous().mT, columns=columns), expected
        ):
            close(got, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lowest_number_of_a_wider_mask_stays_finite(dtype: torch.dtype) -> None:
    case = make("lowest")
    for path in (attend, dense):
        out, lse = path(*(x.to(dtype) for x in case[:3]), mask=case.mask, scale=0.25)
        assert lse.isfinite().all()
        close(out, oracle(case, None)[0], 3 * TOLERANCE[dtype])
    mask = case.mask.masked_fill(case.mask < -1e30, -math.inf)
    assert not attend(*(x.to(dtype) for x in case[:3]), mask=mask)[0][1, :, 3].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", ["causal", "left_padding"])
def test_gradients_of_any_stride(mask: str, device: str) -> None:
    case = make(mask, dtype=torch.float32, device=device)
    columns = make_columns(case, 1)
    leaves = (*case[:3], *columns)
    out = attend(*case[:3], mask=case.mask, causal=case.causal, columns=columns)[0]
    expected = oracle(case, columns)[0]
    for weight in (
        torch.ones((), device=device).expand(out.shape),
        torch.randn(2, 4, 16, 7, device=device).mT,
    ):
        got = torch.autograd.grad(out, leaves, weight, retain_graph=True)
        wanted = torch.autograd.grad(expected, leaves, weight.double(), retain_graph=True)
        for one, other in zip(got, wanted):
            close(one, other, 1e-5)


def test_inputs_are_left_as_they_were() -> None:
    case = make("blind", dtype=torch.float32)
    columns = make_columns(case, 1)
    before = [x.detach().clone() for x in (*case[:4], *columns)]
    with torch.no_grad():
        attend(*case[:3], mask=case.mask, columns=columns)
    assert all(torch.equal(x, y) for x, y in zip((*case[:4], *columns), before))


def test_dense_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("left_padding")
    columns = make_columns(case, 1, logit=(4, 7, 1))
    with torch.no_grad():
        whole = dense(*case[:3], mask=case.mask, scale=0.25, columns=columns)
        monkeypatch.setattr("biassurgery.ops.dense.MAX_LOGITS", 2 * 4 * 11 * 3)
        parts = dense(*case[:3], mask=case.mask, scale=0.25, columns=columns)
    for one, other in zip(parts, whole):
        close(one, other, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_shares_and_keeps_the_mean(device: str) -> None:
    torch.manual_seed(0)
    case = make("causal", dtype=torch.float32, device=device)
    columns = make_columns(case, 1)
    with torch.no_grad():
        whole, lse = attend(*case[:3], causal=True, columns=columns)
        draws = [attend(*case[:3], causal=True, columns=columns, dropout=0.3) for _ in range(2000)]
    outs = torch.stack([out for out, _ in draws])
    assert outs.std(0).min() > 0.01
    error = (outs.mean(0) - whole).abs() / (outs.std(0) / math.sqrt(len(draws)))
    assert error.max() < 5
    torch.testing.assert_close(draws[0][1], lse)


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


def test_parts_without_gradient_are_skipped() -> None:
    case = make("causal", dtype=torch.float32)
    columns = make_columns(case, 1)
    frozen = [x.detach() for x in case[:3]]
    out, lse = attend(*frozen, causal=True, columns=columns)
    wanted = torch.autograd.grad(attend(*case[:3], causal=True, columns=columns)[0].sum(), columns)
    for one, other in zip(torch.autograd.grad(out.sum(), columns), wanted):
        assert torch.equal(one, other)
    assert not attend(*frozen, causal=True)[0].requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda c: {"k": c.k[:, :1].repeat(1, 3, 1, 1), "v": c.v[:, :1].repeat(1, 3, 1, 1)},
            "k: 3 heads for 4",
        ),
        (lambda c: {"q": c.q[0]}, "q: 3 dimensions"),
        (lambda c: {"k": c.k[..., :5]}, "k: shape"),
        (lambda c: {"v": c.v[:, :, :5]}, "v: shape"),
        (lambda c: {"dropout": 1.0}, "dropout: 1.0"),
        (lambda c: {"mask": torch.ones(7, 12, dtype=torch.bool)}, "mask: shape"),
        (lambda c: {"mask": torch.ones(7, 11, dtype=torch.int64)}, "mask: dtype"),
        (
            lambda c: {"columns": Columns(torch.zeros(1), torch.zeros(3, 1, 16))},
            "columns.key: shape",
        ),
        (
            lambda c: {"columns": Columns(torch.zeros(1), None, torch.zeros(4, 1, 8))},
            "columns.value: shape",
        ),
        (
            lambda c: {
                "columns": Columns(torch.zeros(1), torch.zeros(4, 2, 16), torch.zeros(4, 1, 16))
            },
            "columns.value: shape",
        ),
        (lambda c: {"columns": Columns(torch.zeros(3, 1, 1))}, "columns.logit: shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, named: str) -> None:
    case = make()
    options = {"q": case.q, "k": case.k, "v": case.v} | change(case)
    with pytest.raises(BadOption, match=named):
        attend(options.pop("q"), options.pop("k"), options.pop("v"), **options)
