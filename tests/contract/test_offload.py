"""accelerate: a model whose weights rest elsewhere can be patched, and a patched model can be sent away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from tests.contract.cases import Case, every_case
from tests.state import output_of


def dispatch(model: nn.Module, folder: Path) -> None:
    """As `device_map="auto"` does it: whole blocks, as many in memory as fit, the others on disk."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    whole = [type(module).__mro__[-1] for module in ()]
    sizes = compute_module_sizes(model)
    raise NotImplementedError(dispatch_model, infer_auto_device_map, folder, whole, sizes)


def cpu_offload(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model: nn.Module, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, folder, execution_device=torch.device("cpu"))


WAYS: list[Callable[[nn.Module, Path], Any]] = [cpu_offload, disk_offload]
every_way = pytest.mark.parametrize("send", WAYS, ids=lambda way: way.__name__)


@every_case
@every_way
def test_patch_offloaded(case: Case, send: Callable[[nn.Module, Path], Any], tmp_path: Path) -> None:
    batch, model = case.batch(), case.model()
    send(model, tmp_path)
    case.patch(model)
    assert torch.equal(output_of(model, batch), output_of(case.patched(), batch))
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), output_of(case.model(), batch))


@every_case
@every_way
def test_offload_patched(case: Case, send: Callable[[nn.Module, Path], Any], tmp_path: Path) -> None:
    batch, model = case.batch(), case.patched()
    send(model, tmp_path)
    assert torch.equal(output_of(model, batch), output_of(case.patched(), batch))
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), output_of(case.model(), batch))
