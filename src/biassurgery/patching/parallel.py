"""Patches with parameters of their own on a model that several processes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from biassurgery.adapters.meshes import is_fully_sharded
from biassurgery.adapters.parallel import tensor_parallel_mesh
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.modes import Mode
from biassurgery.surgery.alike import alike
from biassurgery.surgery.edit import Edit, Place


def check_gradients(model: nn.Module, host: Host, mode: Mode, places: Iterable[Place]) -> None:
    """Raise `UnsupportedModel` if the gradients of new parameters would stay each rank's own.

    DistributedDataParallel and FSDP2 average those of the parameters that a model has when they
    wrap it.
    """
    if not any(True for _ in _parameters(places)):
        return
    for wrapper, wraps in (
        ("DistributedDataParallel", bool(_wrappers(model))),
        ("fully_shard", is_fully_sharded(host.root)),
    ):
        if wraps:
            raise UnsupportedModel(
                f"model: {wrapper} has wrapped it already, and would not average the gradients of"
                f" the parameters that {mode.name!r} adds, so that they would differ from rank to"
                " rank; patch the model first, then wrap it."
            )


def check_reducer(model: nn.Module, leaving: Iterable[Edit]) -> None:
    """Raise `UnsupportedModel` if DistributedDataParallel would wait for gradients that are gone.

    It then leaves other gradients, too, as each rank has them, and says so a step later.
    """
    waits = any(not wrapper.find_unused_parameters for wrapper in _wrappers(model))
    if waits and any(True for edit in leaving for _ in edit.parameters()):
        raise UnsupportedModel(
            "model: DistributedDataParallel waits for the gradients of the parameters that this"
            " patch added; unpatch the model inside, unpatch_model(model.module), and wrap it anew,"
            " or wrap it with find_unused_parameters=True from the beginning."
        )


def make_alike(root: nn.Module, places: Iterable[Place]) -> None:
    """Give new parameters the same values on all tensor-parallel ranks: the first one's."""
    mesh = tensor_parallel_mesh(root)
    if mesh is not None:
        for parameter in _parameters(places):
            alike(parameter.data, mesh)


def _parameters(places: Iterable[Place]) -> Iterator[nn.Parameter]:
    for place in places:
        yield from place.edit.parameters()


def _wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """DistributedDataParallel around a model, or around parts of it."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
