"""Which ranks of `torch.distributed` run a model on other data, and which share it on the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from biassurgery.adapters.libraries import is_fsdp, is_of
from biassurgery.adapters.meshes import data_dimensions, meshes_of
from biassurgery.errors import BadOption

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
else:  # a torch that was built without it
    ProcessGroup = DeviceMesh = Any

Group: TypeAlias = ProcessGroup | Literal[False] | None


class Sharing(NamedTuple):
    """How ranks share a model and its data.

    Attributes:
        ranks: the global ranks that take part in a measurement, ascending.
        together: of them and others, this rank and those that run one model with it, tensor
            parallel for example: they read the same data, which count once.
    """

    ranks: tuple[int, ...]
    together: tuple[int, ...]


def sharing(model: Any, group: Group) -> Sharing | None:
    """Who takes part with this rank.

    Args:
        model: as a user gave it, be it a model or not.
        group: a `ProcessGroup`; None: the group of DistributedDataParallel, the data-parallel mesh
            that the model's parameters (FSDP2, HSDP) are on, or else all ranks; False: nobody.

    Returns:
        None: this rank is alone.

    Raises:
        BadOption: a group that is none, or that this rank is not in.
    """
    distributed = torch.distributed
    if group is False:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        if group is not None:
            raise BadOption(
                f"group: {group!r}, but torch.distributed is not initialised; call"
                " torch.distributed.init_process_group first, or leave group= out."
            )
        return None
    rank = distributed.get_rank()
    meshes = list(meshes_of(model))
    together = max([(rank,), *(_together(mesh, model) for mesh in meshes)], key=len)
    if group is not None:
        ranks = _ranks_of(group)
    elif (wrapped := _ddp(model)) is not None:
        ranks = _ranks_of(wrapped.process_group)
    else:
        of_data = [_all_ranks(mesh) for mesh in meshes if any(data_dimensions(mesh, model))]
        ranks = max(of_data, key=len, default=tuple(range(distributed.get_world_size())))
    return None if len(ranks) == 1 else Sharing(tuple(sorted(ranks)), together)


def everybody(group: Any) -> Sharing | None:
    """All ranks, where `group` does not say who takes part.

    None: it says that this rank does not.
    """
    outside = getattr(torch.distributed, "GroupMember", None)
    if outside is not None and group == outside.NON_GROUP_MEMBER:  # what new_group returned here
        return None
    return sharing(None, None)


def needed_ranks(model: nn.Module) -> tuple[int, ...]:
    """The ranks that have to run a model whenever this one does, this one among them, ascending.

    Those that compute it together, and those that hold its weights sharded (FSDP2, the older FSDP).
    Nobody: this rank runs it alone.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ()
    older = ("torch.distributed.fsdp", "FullyShardedDataParallel")
    if any(is_of(module, *older) for module in model.modules()):
        return tuple(range(torch.distributed.get_world_size()))
    sharded = any(map(is_fsdp, model.modules()))
    of_mesh = [_all_ranks(m) if sharded else _together(m, model) for m in meshes_of(model)]
    ranks = sorted({rank for ranks in of_mesh for rank in ranks})
    return tuple(ranks) if len(ranks) > 1 else ()


def without_ddp(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel.

    In each forward that sends the buffers of rank 0 around, also without gradients: ranks that run
    it other numbers of times would wait for each other.
    """
    wrapped = _ddp(model)
    return model if wrapped is None else wrapped.module


def _ddp(model: Any) -> nn.parallel.DistributedDataParallel | None:
    """DistributedDataParallel around a model, be it compiled or not."""
    inner = model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.parallel.DistributedDataParallel) else None


def _ranks_of(group: Any) -> tuple[int, ...]:
    if not isinstance(group, ProcessGroup):
        raise BadOption(
            f"group: {group!r}; give a torch.distributed.ProcessGroup that this rank is in, False"
            " for this rank alone, or None."
        )
    return tuple(torch.distributed.get_process_group_ranks(group))


def _together(mesh: DeviceMesh, model: nn.Module) -> tuple[int, ...]:
    """The ranks that differ from this one only along dimensions that share data."""
    at = mesh.get_coordinate()
    assert at is not None  # this rank is in the mesh
    places = [c if is_data else slice(None) for c, is_data in zip(at, data_dimensions(mesh, model))]
    return tuple(mesh.mesh[tuple(places)].flatten().tolist())


def _all_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())
