"""The arguments of one forward of a text model, from a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from biassurgery.errors import BadBatch


def forward_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without labels, no cache, and positions that begin at the first real token where
    padding comes first.

    Models with learned positions would otherwise read a left-padded sequence at positions that it
    never has by itself.
    """
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments.setdefault("use_cache", False)
    mask = batch.get("attention_mask")
    if (
        "position_ids" in parameters
        and "position_ids" not in batch
        and isinstance(mask, Tensor)
        and not mask[:, 0].all()
    ):
        arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return arguments


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that give a decoder its cache, whose name changed in transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def named(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name; those by keyword also where a decorator renames them for the
    function.
    """
    return {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}


def call_with(function: Callable[..., Any], main: str, batch: Mapping[str, Any]) -> Any:
    """Call a function of a batch's main input, with what else the batch holds but labels by name.

    Raises:
        BadBatch: the function does not take it.
    """
    others = {name: value for name, value in batch.items() if name not in (main, "labels")}
    parameters = inspect.signature(function).parameters
    unknown = [name for name in others if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise BadBatch(
            f"batches: a batch has {', '.join(unknown)}, which this model does not take; leave it"
            " out."
        )
    return function(batch[main], **others)
