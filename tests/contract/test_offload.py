"""accelerate: offloaded models can be patched, and patched models can be offloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from tests.contract.cases import CASES, NOT_OFFLOADABLE, Case, parametrize
from tests.state import output_of

CPU = torch.device("cpu")
Send = Callable[[Case, Any, Path], Any]


def dispatch(case: Case, model: Any, folder: Path) -> None:
    """What `device_map="auto"` does: whole blocks, as many in memory as fit, the others on disk."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    block = case.block(model)
    path = next(name for name, module in model.named_modules() if module is block)
    half = compute_module_sizes(model)[""] // 2
    device_map = infer_auto_device_map(
        model, {"cpu": half, "disk": 100 * half}, [type(case.block(case.model())).__name__]
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    # The patched block is not torn apart.
    assert not any(name.startswith(f"{path}.") for name in device_map)
    dispatch_model(model, device_map, main_device=CPU, offload_dir=folder)


def cpu_offload(case: Case, model: Any, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def disk_offload(case: Case, model: Any, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, folder, CPU)


cases = parametrize(
    [
        case
        for case in CASES
        if not (case.on_attention or case.on_weights) and case.family not in NOT_OFFLOADABLE
    ]
)
every_way = pytest.mark.parametrize(
    "send", [dispatch, cpu_offload, disk_offload], ids=lambda way: way.__name__
)


@cases
@every_way
def test_patch_offloaded(case: Case, send: Send, tmp_path: Path) -> None:
    model = case.model()
    send(case, model, tmp_path)
    case.patch(model)
    assert_runs_and_leaves(case, model)


@cases
@every_way
def test_offload_patched(case: Case, send: Send, tmp_path: Path) -> None:
    model = case.patched()
    send(case, model, tmp_path)
    assert_runs_and_leaves(case, model)


def assert_runs_and_leaves(case: Case, model: Any) -> None:
    """A patched model whose weights rest elsewhere computes the same, and is unpatched bitwise."""
    batch = case.batch()
    assert torch.equal(output_of(model, batch), output_of(case.patched(), batch))
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), output_of(case.model(), batch))
