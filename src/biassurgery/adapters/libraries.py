"""Which library a model is from, told without importing that library."""

from __future__ import annotations

from torch import nn


def is_of(model: nn.Module, module: str, *names: str) -> bool:
    """Whether a class that a model is an instance of is defined in a module or package.

    If there are `names`, it must have one of these.
    """
    return any(
        f"{cls.__module__}.".startswith(f"{module}.") and (not names or cls.__name__ in names)
        for cls in type(model).__mro__
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return is_of(model, "transformers.modeling_utils", "PreTrainedModel")


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was called on this module: its forward gathers parameters."""
    return is_of(module, "torch.distributed.fsdp", "FSDPModule")
