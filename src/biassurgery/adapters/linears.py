"""The linear layers in a model's blocks, whoever made them: torch, transformers, or a quantiser."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from biassurgery.adapters.parallel import tensor_parallel_mesh
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import edits_of
from biassurgery.surgery.linear import EditedLinear
from biassurgery.surgery.swap import Swapped, check_swappable, host_class


class Linear(NamedTuple):
    """A linear layer of a model.

    Attributes:
        name: as in `named_modules()` of the whole model.
        layer: the block that it is in.
        module: the layer itself.
    """

    name: str
    layer: int
    module: nn.Module


def linears(host: Host) -> list[Linear]:
    """Every linear layer in the blocks, in the model's order; one that several share comes once.

    Raises:
        UnsupportedModel: there is none, the class of one does not decide how it runs, or each
            tensor-parallel rank has a part of them.
    """
    if tensor_parallel_mesh(host.root) is not None:
        raise UnsupportedModel(
            f"model: {type(host.root).__name__} is split over tensor-parallel ranks, each of which"
            " sees a part of what a linear layer reads; load it on one rank."
        )
    names = {module: name for name, module in host.root.named_modules()}
    found: dict[nn.Module, Linear] = {}
    for layer, block in enumerate(host.blocks):
        for module in block.modules():
            if is_linear(module) and module not in found:
                found[module] = Linear(names[module], layer, module)
    if not found:
        raise UnsupportedModel(
            f"model: the blocks of {type(host.model).__name__} have no linear layers (nn.Linear,"
            " Conv1D, or a quantised one of that name); there is nothing to diagnose."
        )
    for name, _, module in found.values():
        check_swappable(module, name)
        if isinstance(module, Swapped) and not isinstance(module, EditedLinear):
            raise UnsupportedModel(
                f"model: {name} has an edit of another kind on it; unpatch_model(model) first."
            )
    return list(found.values())


def stacked_experts(host: Host) -> list[str]:
    """Names of the modules in the blocks that keep the weights of several linear maps in a stack.

    transformers 5 keeps experts so: (E, N, D), of which a forward runs some on some tokens.
    """
    names = {module: name for name, module in host.root.named_modules()}
    found = {
        names[module]: None
        for block in host.blocks
        for module in block.modules()
        if "Expert" in host_class(module).__name__
        and any(p is not None and p.dim() == 3 for p in module._parameters.values())
    }
    return list(found)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map: of torch, Conv1D of transformers, or a quantised one.

    Those of bitsandbytes, quanto, HQQ, AWQ and GPTQ derive from no common class, but the class
    whose forward they run has the word in its name. A router that derives from `nn.Linear` runs one
    of its own, and a norm of "KimiLinear" has other weights.
    """
    parts = len(edits_of(module))
    runs = next(cls for cls in host_class(module).mro() if "forward" in vars(cls)).__name__
    named = runs == "Conv1D" or runs.endswith("Linear") or ("Linear" in runs and _sized(module))
    weighted = any(hasattr(module, name) for name in ("weight", "qweight", "W_q"))
    return named and weighted and len(module._modules) == parts


def _sized(module: nn.Module) -> bool:
    """Whether a module says how many channels it returns, as linear layers do."""
    return any(hasattr(module, name) for name in ("out_features", "outfeatures"))


def outputs_of(module: nn.Module) -> int | None:
    """Channels that a linear layer returns; None: it does not say."""
    return getattr(module, "out_features", getattr(module, "nf", None))


def weights_of(module: nn.Module) -> Tensor | None:
    """(N, D) float32, what each output of a linear layer takes of its inputs.

    None: its weights are packed in a way that only its own code can read.
    """
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        return None
    if weight.dtype.itemsize == 1:  # float8, whose scales are elsewhere
        return None
    rows = weight if hasattr(module, "out_features") else weight.T
    return rows.detach().float()
