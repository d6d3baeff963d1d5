"""What can be seen of CUDA without a GPU: patched models and kernels on torch's fake tensors.

Fake tensors have a device and a dtype but no numbers. An operator that mixes devices raises, and so
does one that would make the host wait for a number, so that what passes here neither leaves the GPU
nor stalls it. That its numbers are right only a GPU can tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from biassurgery.ops.columns import Columns
from biassurgery.ops.fused import fused
from biassurgery.ops.kernels import KERNELS, Inputs, choose_kernel, kernel_mask
from tests.contract.cases import CASES, Case, parametrize
from tests.devices.pretended import first, replaced

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="this torch cannot pretend"
)

# Families differ in how a host reaches our code, modes in what it does there: every mode on one
# family, one of each kind on all.
WHOLE = ("llama", "timm_vit")
TYPICAL = (
    "set_mean",
    "instrument",
    "attention_bias kv",
    "transplant",
    "fix_registers mean",
    "test_time_registers",
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def sent(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in this dtype, and its buffers, on a fake GPU."""

    def moved(_: str, tensor: Tensor) -> Tensor:
        there = mode.from_tensor(tensor.detach()).to("cuda")
        return (
            nn.Parameter(there.to(dtype), tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else there
        )

    return replaced(model, moved)


@parametrize([case for case in CASES if case.family in WHOLE or case.variant in TYPICAL])
def test_patched_models(case: Case) -> None:
    # Text in the dtype that flash takes, images in the one of the efficient kernel.
    dtype = torch.bfloat16 if case.modality == "text" else torch.float32
    plain = case.model()
    model = case.patched()
    batch = case.batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = mode.from_tensor(batch).to("cuda")
        try:
            sent(plain, mode, dtype)(batch)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pytest.skip("this version of the model waits for numbers itself, unpatched")
        output = first(sent(model, mode, dtype)(batch))
    assert (output.device.type, output.dtype) == ("cuda", dtype)


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("name", "dtype", "masked"),
    [
        ("flash", torch.bfloat16, False),
        ("efficient", torch.float32, False),
        ("efficient", torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("queries", [1, 7, 11])
def test_kernels(name: str, dtype: torch.dtype, masked: bool, queries: int) -> None:
    """Their signatures and the shapes of what they return, forward and backward."""
    q, k, v = (on_gpu(2, 4, length, 16, dtype=dtype) for length in (queries, 11, 11))
    given = torch.ones(2, 1, queries, 11, dtype=torch.bool, device="cuda") if masked else None
    assert choose_kernel(q, k, v, given, True) == name
    inputs = Inputs(q, k, v, *kernel_mask(name, given, True, q, k), 0.25)
    out, lse, saved = KERNELS[name].forward(inputs)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        q.shape,
        dtype,
        q.shape[:3],
        torch.float32,
    )
    gradients = KERNELS[name].backward(torch.empty_like(out), inputs, out, lse, saved)
    assert [each.shape for each in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [2, 4])
def test_columns_beside_grouped_heads(heads: int, dtype: torch.dtype) -> None:
    """The kernels of a GPU are given a key for each query head; the columns may still come with one
    for each key head.
    """
    q = on_gpu(2, 4, 7, 16, dtype=dtype)
    k = on_gpu(2, 2, 11, 16, dtype=dtype)
    v = on_gpu(2, 2, 11, 16, dtype=dtype)
    columns = Columns(
        on_gpu(4, 1, 3, dtype=dtype),
        on_gpu(heads, 3, 16, dtype=dtype),
        on_gpu(heads, 3, 16, dtype=dtype),
    )
    found = fused(q, k, v, causal=True, scale=0.25, columns=columns)
    assert found is not None
    assert (found[0].shape, found[0].dtype, found[1].shape) == (q.shape, dtype, q.shape[:3])
