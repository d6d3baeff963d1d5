"""A bias column beside a single query, as in a step of cached decoding: the same numbers, with few
operators, and one fused one when compiled.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from biassurgery.errors import BadOption
from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from biassurgery.ops.one_query import attend_one
from tests.ops.plain_attention import DEVICES, TOLERANCE, Case, make, make_columns, oracle


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "left_padding", "blind"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("parts", ["kv", "k", "v", ""])
@pytest.mark.parametrize(("heads", "own"), [((4, 4), 4), ((4, 2), 2), ((4, 2), 4), ((4, 1), 1)])
def test_one_query(
    heads: tuple[int, int],
    own: int,
    parts: str,
    count: int,
    mask: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """`own`: heads of the column's key and value."""
    case = make(mask, queries=1, heads=heads, dtype=dtype, device=device)
    columns = make_columns(case, count, parts, heads=own)
    expected, expected_lse = oracle(case, columns)
    with torch.no_grad():
        out, lse = attend(case.q, case.k, case.v, mask=case.mask, columns=columns)
        bare, _ = attend(case.q, case.k, case.v, mask=case.mask)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert (out.double() - bare.double()).abs().max() > 3 * tolerance
    trained, trained_lse = attend(case.q, case.k, case.v, mask=case.mask, columns=columns)
    assert trained.requires_grad
    assert torch.equal(trained, out)
    assert torch.equal(trained_lse, lse)


def alone(case: Case, columns: Columns) -> Tensor | None:
    """`attend_one` on one sequence, with a column as the edits of attention hold it."""
    _, key, value = columns
    assert key is not None
    assert value is not None
    parts = (columns.logit.reshape(-1, 1), key.squeeze(1), value.squeeze(1))
    return attend_one(case.q, case.k, case.v, *parts, scale=case.q.shape[-1] ** -0.5)


def one_sequence(
    dtype: torch.dtype, heads: tuple[int, int], device: str = "cpu", rows: int = 1
) -> tuple[Case, Columns]:
    case = make(queries=1, heads=heads, dtype=dtype, device=device)
    case = Case(*(x[:rows] for x in case[:3]), None, False)
    columns = make_columns(case, 1, heads=heads[1])
    logit = columns.logit.expand(1, heads[0], 1, 1).to(dtype)
    return case, columns._replace(logit=logit.detach().reshape(-1, 1, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_a_sequence_alone(heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    case, columns = one_sequence(dtype, heads, device)
    with torch.no_grad():
        expected, _ = oracle(case, columns)
        bare, _ = attend(case.q, case.k, case.v)
        out = alone(case, columns)
    assert out is not None
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert (out.double() - bare.double()).abs().max() > 3 * tolerance


def test_what_is_left_to_the_way_that_serves_all() -> None:
    case, columns = one_sequence(torch.float32, (4, 2))
    with torch.no_grad():
        assert alone(case, columns) is not None
        assert alone(Case(*(x[..., :8] for x in case[:3]), None, False), columns) is None
        assert alone(case._replace(k=case.k.double()), columns) is None
        assert alone(case._replace(k=case.k[:, :1], v=case.v[:, :1]), columns) is None
        assert alone(case._replace(k=case.k[:, :, :0], v=case.v[:, :, :0]), columns) is None
        assert alone(case._replace(k=case.k.mT.contiguous().mT), columns) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert alone(case, columns) is None
    assert alone(case, columns) is None  # with gradients
    assert alone(*one_sequence(torch.bfloat16, (4, 2))) is None
    with torch.no_grad():
        assert alone(*one_sequence(torch.float32, (4, 2), rows=2)) is None


@pytest.mark.parametrize("logit", [torch.tensor(0.3), torch.linspace(-1, 1, 4)[:, None, None]])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("queries", [1, 2])
def test_one_logit_for_all_columns(queries: int, count: int, logit: Tensor) -> None:
    """The values say how many there are."""
    case = make(queries=queries, heads=(4, 2), dtype=torch.float32)
    value = torch.randn(2, count, case.v.shape[3], generator=torch.Generator().manual_seed(0))
    columns = Columns(logit, None, value)
    expected, expected_lse = oracle(case, Columns(logit.expand(4, 1, count), None, value))
    for trained in (False, True):
        with torch.set_grad_enabled(trained):
            out, lse = attend(case.q, case.k, case.v, columns=columns)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(torch.zeros(3, 1, 1)), "columns.logit"),
        (Columns(torch.zeros(2, 1, 4, 1, 1)), "columns.logit"),
        (Columns(torch.zeros(1), torch.zeros(3, 1, 16)), "columns.key"),
        (Columns(torch.zeros(1), torch.zeros(4, 1, 15)), "columns.key"),
        (Columns(torch.zeros(1), torch.zeros(4, 16)), "columns.key"),
        (Columns(torch.zeros(1), torch.zeros(4, 1, 16), torch.zeros(4, 2, 16)), "columns.value"),
    ],
)
def test_columns_that_do_not_fit(columns: Columns, message: str) -> None:
    case = make(queries=1, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(BadOption, match=message):
        attend(case.q, case.k, case.v, columns=columns)


class Count(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# Views, and a question that runs nothing.
VIEWS = {
    "promote_types",
    "view",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "select",
    "_unsafe_view",
    "detach",
}


def one_step(dtype: torch.dtype) -> tuple[Case, Columns]:
    case = make(queries=1, dtype=dtype)
    return case, make_columns(case, 1, heads=2)


def test_a_step_takes_few_operators() -> None:
    """Nothing is repeated, copied or cast in float32."""
    case, columns = one_step(torch.float32)
    found = []
    with torch.no_grad():
        for given in (None, columns):
            with Count() as count:
                attend(case.q, case.k, case.v, columns=given)
            found.append({name: n for name, n in count.counts.items() if name not in VIEWS})
    bare, joined = found
    assert sum(bare.values()) == 1
    more = Counter(joined) - Counter(bare)
    assert more == Counter(["mul", "sum", "add", "clamp", "sub", "sigmoid_", "lerp_", "logaddexp"])
    one = one_sequence(torch.float32, (4, 2))
    with torch.no_grad(), Count() as count:
        alone(*one)
    lean = Counter({name: n for name, n in count.counts.items() if name not in VIEWS})
    assert lean - Counter(bare) == Counter(["sub_", "baddbmm", "sigmoid_", "lerp_"])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_fused_operator_more(dtype: torch.dtype) -> None:
    from torch._inductor.utils import run_and_get_code

    case, columns = one_step(dtype)
    calls = []
    for given in (None, columns):

        def step(case: Case, given: Columns | None) -> torch.Tensor:
            return attend(case.q, case.k, case.v, columns=given)[0]

        torch._dynamo.reset()
        with torch.no_grad():
            run = torch.compile(step, fullgraph=True, dynamic=False)
            out, (code,) = run_and_get_code(run, case, given)
            expected = attend(case.q, case.k, case.v, columns=given)[0]
        torch.testing.assert_close(out, expected)
        body = code[code.index("def call(") :].splitlines()
        calls.append([line for line in body if "cpp_fused" in line or "extern_kernels" in line])
    bare, joined = calls
    assert len(joined) == len(bare) + 1
    assert "extern_kernels" not in "".join(joined)
