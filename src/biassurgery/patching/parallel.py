"""Patches with parameters of their own on a model that several processes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from biassurgery.adapters.parallel import is_fully_sharded, tensor_parallel_mesh
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.modes import Mode
from biassurgery.surgery.alike import alike
from biassurgery.surgery.edit import Place


def check_gradients(model: nn.Module, host: Host, mode: Mode, places: Iterable[Place]) -> None:
    """Raise `UnsupportedModel` if the gradients of new parameters would stay each rank's own.

    DistributedDataParallel and FSDP2 average those of the parameters that a model has when they
    wrap it.
    """
    if not any(True for _ in _parameters(places)):
        return
    for wrapper, wraps in (
        ("DistributedDataParallel", _is_ddp(model)),
        ("fully_shard", is_fully_sharded(host.root)),
    ):
        if wraps:
            raise UnsupportedModel(
                f"model: {wrapper} has wrapped it already, and would not average the gradients of"
                f" the parameters that {mode.name!r} adds, so that they would differ from rank to"
                " rank; patch the model first, then wrap it."
            )


def make_alike(host: Host, places: Iterable[Place]) -> None:
    """Give new parameters the same values on all tensor-parallel ranks: the first one's."""
    mesh = tensor_parallel_mesh(host.root)
    if mesh is not None:
        for parameter in _parameters(places):
            alike(parameter.data, mesh)


def _parameters(places: Iterable[Place]) -> Iterator[nn.Parameter]:
    for place in places:
        yield from place.edit.parameters()


def _is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is among the wrappers of a model."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())
