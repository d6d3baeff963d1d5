"""How several processes share one model: which mesh splits its weights, and what that leaves alike.

Tensor parallelism (`tp_plan` of transformers, `parallelize_module` of torch) and FSDP2 both hold
parameters as `DTensor`s; only under the first does a rank compute with its part of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.meshes import data_dimensions
from biassurgery.adapters.registry import Host, unwrap
from biassurgery.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TENSOR_PARALLEL = "tp"  # the name of that dimension of a mesh, in transformers as in torch's guides


def tensor_parallel_mesh(model: nn.Module) -> DeviceMesh | None:
    """The one-dimensional mesh of the ranks that compute one model together, on the same data.

    None: there is one such rank. What FSDP2 shards is whole when a layer runs, and does not count.

    Args:
        model: itself, or wrapped.

    Raises:
        UnsupportedModel: its mesh does not tell which of the dimensions that is.
    """
    inner = unwrap(model)
    for parameter in _distributed_parameters(inner):
        mesh = parameter.device_mesh
        dimension = _tensor_parallel_dimension(inner, parameter)
        if dimension is not None and mesh.size(dimension) > 1:
            return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[dimension]]
    return None


def check_stream(host: Host) -> None:
    """Raise `UnsupportedModel` if each rank has some tokens only of the residual stream.

    Sequence parallelism is known by the norms in the blocks, whose weights it turns into `DTensor`s
    that are the same on every rank.
    """
    for layer, block in enumerate(host.blocks):
        for name, module in block.named_modules():
            own = list(module.parameters(recurse=False))
            if own and all(_is_replicated(host.root, parameter) for parameter in own):
                raise UnsupportedModel(
                    f"model: {name} of block {layer} is sequence-parallel, by which a rank has some"
                    " tokens only of what the blocks hand on, and sinks and massive activations"
                    " cannot be told by them; load it with a tp_plan that leaves"
                    " 'sequence_parallel' out."
                )


def check_neurons(host: Host) -> None:
    """Raise `UnsupportedModel` if each rank has some neurons of an MLP only."""
    mesh = tensor_parallel_mesh(host.root)
    if mesh is not None:
        raise UnsupportedModel(
            f"model: the neurons of {type(host.model).__name__} are split over {mesh.size()}"
            " tensor-parallel ranks, and register neurons are looked for among all; load it on one"
            " rank."
        )


def gathered(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor, whole: all ranks that hold a part of it have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _distributed_parameters(module: nn.Module) -> list[Any]:
    """The parameters that are DTensors."""
    if not _is_distributed():
        return []
    return [parameter for parameter in module.parameters() if hasattr(parameter, "device_mesh")]


def _tensor_parallel_dimension(model: nn.Module, parameter: Any) -> int | None:
    """Which dimension of a DTensor's mesh is that of tensor parallelism; None: it has none."""
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL in names:
        return names.index(TENSOR_PARALLEL)
    together = [
        dimension
        for dimension, is_data in enumerate(data_dimensions(mesh, model))
        if not is_data and mesh.size(dimension) > 1
    ]
    if len(together) < 2:
        return together[0] if together else None
    raise UnsupportedModel(
        f"model: its weights lie on a mesh with the dimensions {names or mesh.ndim}, and several of"
        f" these are not for data, none of them called {TENSOR_PARALLEL!r}; name the one"
        " of tensor parallelism so (init_device_mesh(..., mesh_dim_names=('dp', 'tp')))."
    )


def _is_replicated(model: nn.Module, parameter: Any) -> bool:
    """Whether a parameter is a DTensor that is the same on all tensor-parallel ranks."""
    if not hasattr(parameter, "device_mesh"):
        return False
    dimension = _tensor_parallel_dimension(model, parameter)
    return dimension is not None and parameter.placements[dimension].is_replicate()
