"""The meshes of ranks that a model lies on, and along which of their dimensions data differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from biassurgery.adapters.libraries import is_fsdp, is_of
from biassurgery.adapters.wrappers import unwrap

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
else:  # a torch that was built without it
    DeviceMesh = Any

# words of the names of mesh dimensions along which ranks read other data; along all others (tp, cp,
# pp, ...) they run one model together, and read the same
_DATA = frozenset(("dp", "ddp", "fsdp", "hsdp", "data", "replicate", "shard", "batch"))


def meshes_of(model: Any) -> Iterator[DeviceMesh]:
    """The meshes of more than one rank that a model's parameters are on, of this rank."""
    from torch.distributed.tensor import DTensor

    if not isinstance(model, nn.Module):
        return
    root = unwrap(model)
    reshard(root)  # else its parameters may be plain tensors, which lie on no mesh
    meshes: list[Any] = [p.device_mesh for p in root.parameters() if isinstance(p, DTensor)]
    meshes.append(getattr(root, "_device_mesh", None))  # transformers, also of plain parameters
    for mesh in dict.fromkeys(meshes):
        if isinstance(mesh, DeviceMesh) and mesh.size() > 1 and mesh.get_coordinate() is not None:
            yield mesh


def reshard(model: nn.Module) -> None:
    """Let the parameters of a model that FSDP2 has sharded be its own again.

    It leaves those of the root gathered when a forward without gradients is over.
    """
    sharded: list[Any] = [module for module in model.modules() if is_fsdp(module)]
    for module in sharded:
        module.reshard()


def data_dimensions(mesh: DeviceMesh, model: nn.Module) -> list[bool]:
    """For each dimension of a mesh: whether ranks read other data along it."""
    names = mesh.mesh_dim_names
    if names is None:  # `fully_shard` makes one, and so do those who call `parallelize_module`
        return [is_fully_sharded(model)] * mesh.ndim
    return [
        size > 1 and _DATA.issuperset(name.lower().split("_"))
        for name, size in zip(names, mesh.shape)
    ]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard`, or the older FSDP, holds parameters of a model."""
    names = ("FSDPModule", "FullyShardedDataParallel")
    return any(is_of(module, "torch.distributed.fsdp", *names) for module in model.modules())
