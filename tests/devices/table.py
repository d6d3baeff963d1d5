"""Every mode on a model that processes or devices share: right, or refused.

A cell compares one patched model with one that a single process has whole: what it returns, on two
ranks also its gradients, and that unpatching leaves the outputs of before. The variants are those
of the contract battery, on the planted LLaMA, and those that need registers on timm's.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.ranks import taking_part
from tests import models, vision
from tests.contract.cases import CASES, VARIANTS, Case
from tests.devices.data_parallel_checks import gathered
from tests.devices.pretended import GPU, back, first, gpus
from tests.devices.ranks import RANKS, on_two_ranks
from tests.devices.tensor_parallel_checks import close, same_on_ranks, split
from tests.devices.test_pretended import RANDOM, over_two

RIGHT, REFUSED, NOT_RUN = "right", "refused", "not run"
STAYS = "right; not undone there"  # unpatching it there is refused
OUTCOMES = {RIGHT, REFUSED, NOT_RUN, STAYS}
ROWS = 4  # of the batch of all ranks
SILENT = ("set_mean", "instrument", "rescale")  # they need not change what this model returns
COLUMNS = (
    "patched, then DDP",
    "DDP, then patched",
    "patched, then FSDP2",
    "FSDP2, then patched",
    "tensor parallel, then patched",
    "two devices, then patched",
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "parallel.md"
BEGIN, END = "<!-- python -m tests.devices --write -->", "<!-- end of the table -->"

Table = dict[str, dict[str, str]]  # outcomes, by variant and column


def case_of(variant: str) -> Case:
    """The case that stands for a variant."""
    text = Case("llama", variant)
    return text if text in CASES else Case("timm_vit", variant)


def table() -> Table:
    """All outcomes; takes two processes and some minutes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.planted("llama").save_pretrained(folder / "llama")
        on_two_ranks([_on_ranks], folder)
        of_ranks = [json.loads(_file(folder, rank).read_text()) for rank in range(RANKS)]
    found: Table = {}
    for variant in VARIANTS:
        found[variant] = {}
        for column in COLUMNS[:-1]:
            said = {one[variant][column] for one in of_ranks}
            found[variant][column] = "; ".join(sorted(said))  # more than one is wrong, too
        found[variant][COLUMNS[-1]] = _outcome(_two_devices, case_of(variant))
    return found


def markdown(found: Table) -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [
        f"| `{variant}` | " + " | ".join(cells[column] for column in COLUMNS) + " |"
        for variant, cells in found.items()
    ]
    return "\n".join(lines)


def documented() -> str:
    """The table in the document."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def write(found: Table) -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{markdown(found)}\n\n{END}{rest.partition(END)[2]}")


def _file(folder: Path, rank: int) -> Path:
    return folder / f"cells{rank}.json"


def _outcome(check: Callable[..., str], *args: Any) -> str:
    try:
        return check(*args)
    except Exception:  # noqa: BLE001 - whatever it is, this cell is wrong, and the others count
        traceback.print_exc()
        return f"WRONG ({traceback.format_exc().strip().splitlines()[-1]})"


def _on_ranks(folder: Path) -> None:
    """All columns but that of devices, on this rank."""
    found: Table = {}
    with taking_part("preparing", None, group=False):  # both calibrate on the same data
        for variant in VARIANTS:
            case_of(variant).arguments()
    for variant in VARIANTS:
        case = case_of(variant)
        found[variant] = {
            COLUMNS[0]: _outcome(_after, case, DistributedDataParallel),
            COLUMNS[1]: _outcome(_before, case, DistributedDataParallel),
            COLUMNS[2]: _outcome(_after, case, _shard),
            COLUMNS[3]: _outcome(_before, case, _shard),
            COLUMNS[4]: _outcome(_tensor_parallel, case, folder),
        }
    _file(folder, dist.get_rank()).write_text(json.dumps(found))


def _blocks(case: Case, model: nn.Module) -> list[nn.Module]:
    return (vision if case.modality == "image" else models).blocks(model, case.family)


def _shard(model: Any, case: Case) -> Any:
    for block in _blocks(case, model):
        fully_shard(block)
    return fully_shard(model)


def _wrapped(wrap: Any, model: Any, case: Case) -> Any:
    return _shard(model, case) if wrap is _shard else wrap(model)


def _refuses(case: Case, model: Any) -> bool:
    """Patch a model; whether that was refused, by which nothing may be left on it."""
    try:
        case.patch(model)
    except UnsupportedModel:
        assert bs.patches(model) == ()
        return True
    return False


def _after(case: Case, wrap: Any) -> str:
    return _data_parallel(case, _wrapped(wrap, case.patched(), case))


def _before(case: Case, wrap: Any) -> str:
    model = _wrapped(wrap, case.model(), case)
    if _refuses(case, model):
        return REFUSED
    return _data_parallel(case, model)


def _forward(model: Any, batch: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return first(model(batch))


def _backward(model: Any, batch: Tensor, seed: int) -> Tensor:
    """What it returns, without its graph; the gradients of a loss are added up."""
    output = _forward(model, batch, seed)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    (output * weights).mean().backward()
    return output.detach()


def _data_parallel(case: Case, model: Any) -> str:
    """Ranks with a part of the batch each, against one process that goes through all parts."""
    rank = dist.get_rank()
    parts = case.batch(ROWS).chunk(RANKS)
    whole, plain = case.patched(), case.model()
    returned = [_backward(whole, part, seed) for seed, part in enumerate(parts)]
    for parameter in whole.parameters():
        if parameter.grad is not None:
            parameter.grad /= RANKS
    close(_backward(model, parts[rank], rank), returned[rank], 2e-5)
    _check_gradients(model, whole)
    _check_effect(case, returned[rank], _forward(plain, parts[rank], rank).detach())
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    try:
        bs.unpatch_model(inner)
    except UnsupportedModel:
        assert len(bs.patches(inner)) == 1
        close(_forward(model, parts[rank], rank), returned[rank], 2e-5)
        return STAYS
    close(_forward(inner, parts[rank], rank), _forward(plain, parts[rank], rank), 2e-5)
    return RIGHT


def _tensor_parallel(case: Case, folder: Path) -> str:
    """Ranks that compute one model, each seeded for itself, against one process with all of it."""
    model = _split(case, folder)
    if _refuses(case, model):
        return REFUSED
    batch, whole, plain = case.batch(), case.patched(), case.model()
    found = _backward(model, batch, dist.get_rank())
    assert same_on_ranks(found)
    returned = _backward(whole, batch, 0)
    close(found, returned, 2e-5)
    _check_gradients(model, whole)
    _check_effect(case, returned, _forward(plain, batch, 0).detach())
    bs.unpatch_model(model)
    close(_forward(model, batch, 0), _forward(plain, batch, 0), 2e-5)
    return RIGHT


def _split(case: Case, folder: Path) -> Any:
    """LLaMA by its `tp_plan`; of timm's the MLPs, for which a plan need not know the attention."""
    if case.modality == "text":
        return split(folder, case.family)
    model = case.model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for block in _blocks(case, model):
        mlp: Any = block.mlp
        parallelize_module(mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def _two_devices(case: Case) -> str:
    """Blocks on two pretended GPUs with accelerate's hooks, against one process on the CPU."""
    if case.on_weights:
        return NOT_RUN  # it moves the exponents of plain tensors, and pretended ones are none
    batch = case.batch(ROWS)
    with torch.no_grad():
        plain, returned = _forward(case.model(), batch, 0), _forward(case.patched(), batch, 0)
    with gpus():
        model = over_two(case.family)
        if _refuses(case, model):
            return REFUSED
        found = back(_forward(model, batch.to(GPU), 0))
        bs.unpatch_model(model)
        close(back(_forward(model, batch.to(GPU), 0)), plain, 1e-3)
    if case.variant in RANDOM:  # drawn on each device for itself
        assert not torch.allclose(found, plain)
    else:
        close(found, returned, 1e-3)
    return RIGHT


def _check_effect(case: Case, patched: Tensor, plain: Tensor) -> None:
    assert case.variant in SILENT or not patched.equal(plain), "the patch does nothing"


def _check_gradients(model: nn.Module, whole: nn.Module) -> None:
    expected = dict(whole.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        other = expected.pop(name.removeprefix("module.")).grad
        if other is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        scale = other.abs().max().clamp(min=1e-4)
        close(gathered(parameter.grad) / scale, other / scale, 2e-4)
        compared += 1
    assert not expected
    assert compared >= 9 * models.LAYERS
