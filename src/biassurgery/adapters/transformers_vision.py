"""Vision transformers of the transformers library: the base class of their declarative adapters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.interface import attention_of, model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.stacks import first_of
from biassurgery.surgery.attention import Attention


class TransformersVision(ImageAdapter):
    """A vision transformer of transformers, with or without its head.

    Attributes:
        model_types: the `config.model_type` values that it serves.
        stacks: where the block list may be, by version and wrapper.
        mlp_outs: where the second linear layer of a block's MLP may be.
        cls: whether the first token is [CLS].
    """

    model_types: ClassVar[tuple[str, ...]]
    stacks: ClassVar[tuple[str, ...]]
    mlp_outs: ClassVar[tuple[str, ...]] = ("mlp.fc2", "output.dense")
    cls: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return is_transformers(model) and model_type(model) in self.model_types

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(first_of(model, self.stacks, "a list of blocks").children())

    def config(self, model: nn.Module) -> Any:
        """The config of the vision transformer, also where it is nested in a larger one."""
        return getattr(model.config, "vision_config", model.config)

    def width(self, model: nn.Module) -> int:
        return self.config(model).hidden_size

    def has_cls(self, model: nn.Module) -> bool:
        return self.cls

    def registers(self, model: nn.Module) -> int:
        return getattr(self.config(model), "num_register_tokens", 0)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return attention_of(model, block, self.config(model))

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        return first_of(block, self.mlp_outs, "the second layer of an MLP")
