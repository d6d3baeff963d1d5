"""Decoders of the transformers library: the base class of every declarative text adapter, and the structural fallback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.base import TextAdapter
from biassurgery.adapters.registry import register_adapter
from biassurgery.errors import UnsupportedModel


class TransformersDecoder(TextAdapter):
    """A causal language model of transformers, with or without its head.

    Attributes:
        model_types: the `config.model_type` values that it serves.
        path: where the block list is, from the base model.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    path: ClassVar[str]

    def matches(self, model: nn.Module) -> bool:
        return _is_transformers(model) and model_type(model) in self.model_types

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(body(model).get_submodule(self.path).children())

    def width(self, model: nn.Module) -> int:
        return text_config(model).hidden_size

    def architecture(self, model: nn.Module) -> str:
        return model_type(model)

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        # A root with an accelerate hook moves data between devices: then the head is run along.
        target = model if hasattr(model, "_hf_hook") else body(model)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        parameters = inspect.signature(target.forward).parameters
        if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            inputs.setdefault("use_cache", False)
        target(**inputs)


def body(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, "base_model", model)


def text_config(model: nn.Module) -> Any:
    """The config of the decoder, also where it is nested in that of a larger model."""
    return model.config.get_text_config()  # type: ignore[union-attr, operator]


def model_type(model: nn.Module) -> str:
    """`config.model_type` of the model."""
    return getattr(getattr(model, "config", None), "model_type", "")  # type: ignore[return-value]


def _is_transformers(model: nn.Module) -> bool:
    return any(c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel" for c in type(model).__mro__)


@register_adapter
class AnyDecoder(TransformersDecoder):
    """The fallback: any transformers model with one list of as many equal blocks as its config says it has layers."""

    family = "any transformers decoder"

    def matches(self, model: nn.Module) -> bool:
        return _is_transformers(model) and bool(_block_lists(model))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        lists = _block_lists(model)
        if len(lists) > 1:
            names = ", ".join(lists)
            raise UnsupportedModel(f"model: {type(model).__name__} has several block lists ({names}); register an adapter that says "
                                   "which of them is the decoder's.")
        return next(iter(lists.values()))


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every outermost module list as long as the config's number of layers."""
    layers = getattr(text_config(model), "num_hidden_layers", None)
    found: dict[str, list[nn.Module]] = {}
    for name, module in body(model).named_modules():
        inside_another = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == layers and not inside_another:
            found[name] = list(module)
    return found
