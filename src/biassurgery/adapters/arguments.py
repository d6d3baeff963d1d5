"""The arguments of a forward: which it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from biassurgery.errors import BadBatch


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a module's forward takes."""
    return inspect.signature(module.forward).parameters


def takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function takes arguments of any name."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def taken(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a forward takes, if what it does not take says nothing.

    Raises:
        BadBatch: it does not take something that would matter.
    """
    parameters = parameters_of(model)
    if takes_anything(parameters):
        return dict(arguments)
    unknown = {
        name: value
        for name, value in arguments.items()
        if name not in parameters and value is not None
    }
    kind = type(model).__name__
    mask = unknown.get("attention_mask")
    if isinstance(mask, Tensor):
        if not mask.all():
            raise BadBatch(
                f"batches: attention_mask has zeros, and {kind} takes no mask, so it would read the"
                " padding; give sequences of one length, without padding."
            )
        del unknown["attention_mask"]
    if unknown:
        raise BadBatch(
            f"batches: a batch has {', '.join(unknown)}, which {kind} does not take; leave it out."
        )
    return {name: value for name, value in arguments.items() if name in parameters}


def call(
    module: Callable[..., Any], arguments: Mapping[str, Any], host: nn.Module | None = None
) -> Any:
    """Run a module on arguments by name, in their places those that it takes by position only.

    Args:
        module: to be called.
        arguments: of its forward.
        host: the model itself, where `module` is a wrapper of it; None: it is none.
    """
    by_name = dict(arguments)
    by_place = []
    for name, parameter in parameters_of(host or module).items():  # type: ignore[arg-type]
        if parameter.kind is not parameter.POSITIONAL_ONLY or name not in by_name:
            break
        by_place.append(by_name.pop(name))
    return module(*by_place, **by_name)


def call_with(function: Callable[..., Any], main: str, batch: Mapping[str, Any]) -> Any:
    """Call a function of a batch's main input, with what else the batch holds but labels by name.

    Raises:
        BadBatch: the function does not take it.
    """
    others = {name: value for name, value in batch.items() if name not in (main, "labels")}
    parameters = inspect.signature(getattr(function, "forward", function)).parameters
    unknown = [name for name in others if name not in parameters]
    if unknown and not takes_anything(parameters):
        raise BadBatch(
            f"batches: a batch has {', '.join(unknown)}, which this model does not take; leave it"
            " out."
        )
    return function(batch[main], **others)
