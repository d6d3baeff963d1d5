"""Where a model runs, also when accelerate has spread it over several devices or offloaded it."""

from __future__ import annotations

import torch
from torch import nn

from biassurgery.adapters.parallel import check_stream
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel


def block_device(block: nn.Module) -> torch.device | None:
    """Where a block runs; None if its parameters are on the meta device for good."""
    device = _execution_device(block)
    if device is not None:
        return device
    return next((p.device for p in block.parameters() if p.device.type != "meta"), None)


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its inputs.

    Raises:
        UnsupportedModel: its weights are not there.
    """
    _check_values(model, type(model).__name__)
    return block_device(model) or torch.device("cpu")


def check_loaded(host: Host) -> None:
    """Raise `UnsupportedModel` if weights of a block are not there, or some of its tokens only."""
    check_stream(host)
    for layer, block in enumerate(host.blocks):
        _check_values(block, f"block {layer}")


def _check_values(module: nn.Module, what: str) -> None:
    if block_device(module) is None and any(True for _ in module.parameters()):
        raise UnsupportedModel(
            f"model: {what} is on the meta device and holds no values; load the weights first."
        )


def check_real(edit: nn.Module) -> None:
    """Raise `UnsupportedModel` if the parameters of a new edit hold no values."""
    if any(tensor.is_meta for tensor in (*edit.parameters(), *edit.buffers())):
        raise UnsupportedModel(
            "model: new parameters of it are put on the meta device here, without values, as inside"
            " accelerate's init_empty_weights(); leave that block, load the weights, then patch."
        )


def _execution_device(module: nn.Module) -> torch.device | None:
    """What the first of accelerate's hooks in a module says."""
    for inner in module.modules():
        device = getattr(getattr(inner, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
