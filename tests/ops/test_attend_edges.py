"""`attend` at the edges: rows that see nothing, large logits, strides, dropout, bad shapes."""

from __future__ import annotations

import math

import pytest
import torch

from biassurgery.errors import BadOption
from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns, column_logits
from biassurgery.ops.dense import dense
from biassurgery.ops.fused import fused
from tests.ops.plain_attention import DEVICES, TOLERANCE, close, make, make_columns, oracle


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
