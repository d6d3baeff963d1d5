"""The base class of adapters of vision transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import Adapter
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.block import added_tokens


class ImageAdapter(Adapter):
    """Vision transformers: prefix tokens ([CLS], registers), then patches.

    Attributes:
        pixel_axes: how many axes `pixel_values` may have.
    """

    modality = "image"
    entry = "blocks"
    pixel_axes: ClassVar[tuple[int, ...]] = (4,)

    @abstractmethod
    def has_cls(self, model: nn.Module) -> bool:
        """Whether the first token is [CLS]."""

    @abstractmethod
    def registers(self, model: nn.Module) -> int:
        """How many register tokens the model has.

        Inside its blocks, a patch may have added more.
        """

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        """The second linear layer of a block's MLP.

        It reads (B, T, neurons) and writes to the residual stream.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where the MLP of"
            f" {type(model).__name__} ends; register neurons need an adapter with mlp_out()."
        )

    def prefix_counters(self, model: nn.Module, block: nn.Module) -> list[str]:
        """The modules in a block that know by `num_prefix_tokens` where patches begin; their names.

        timm's rotary attention does. Raises `UnsupportedModel` if no token can be added before the
        patches.
        """
        return [
            name for name, module in block.named_modules() if "num_prefix_tokens" in vars(module)
        ]

    def patch_grid(
        self, model: nn.Module, batch: Mapping[str, Any], patches: int
    ) -> tuple[int, int] | None:
        """Rows and columns of the patches of a batch of images.

        None: they follow from the size of the images.
        """
        return None

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        cls = ("cls",) if self.has_cls(model) else ()
        registers = self.registers(model) + added_tokens(self.blocks(model)[0])
        return (*cls, *(f"register:{i}" for i in range(registers)), "patch")

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        last = len(self.roles(model)) - 1
        codes = torch.arange(shape[1], device=batch["pixel_values"].device).clamp(max=last)
        return codes.expand(shape)
