"""Everything about a model that an operation must leave as it was, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def output_of(model: Any, batch: Any) -> Tensor:
    """Logits (or features) of one forward, with the same random numbers each time.

    In the model's own mode, without gradients.
    """
    torch.manual_seed(123)
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return output_tensor(out)


def output_tensor(output: Any) -> Tensor:
    """What a model is run for: logits, an embedding, or hidden states."""
    if isinstance(output, Tensor):
        return output
    return next(
        output[name] for name in ("logits", "image_embeds", "last_hidden_state") if name in output
    )


def bits(tensor: Tensor) -> Any:
    """The content of a tensor in a form that compares equal for NaN too."""
    if tensor.is_meta:
        return tensor.dtype, tuple(tensor.shape)
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes, modes, hooks, parameters and buffers of every module, in order."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name}:class"] = type(module)
        seen[f"{name}:attributes"] = sorted(vars(module))
        seen[f"{name}:children"] = list(module._modules)
        seen[f"{name}:training"] = module.training
        seen[f"{name}:hooks"] = [list(getattr(module, hook).items()) for hook in HOOKS]
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                state = None
                if tensor is not None:
                    state = (id(tensor), tensor.requires_grad, tensor._version, bits(tensor))
                seen[f"{name}.{key}"] = state
    seen["state_dict"] = [(key, bits(tensor)) for key, tensor in model.state_dict().items()]
    return seen


@contextmanager
def untouched(model: nn.Module, batch: Any = None) -> Iterator[None]:
    """Assert that the model, and its output on a batch, are the same after the block as before."""
    before = fingerprint(model)
    output = None if batch is None else bits(output_of(model, batch))
    yield
    after = fingerprint(model)
    assert set(after) ^ set(before) == set()
    assert list(after) == list(before)
    assert [name for name in before if after[name] != before[name]] == []
    if batch is not None:
        assert bits(output_of(model, batch)) == output
