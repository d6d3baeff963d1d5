"""What this library must know about a host model: where its blocks are, how to run it, and what
each token is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from biassurgery.errors import BadBatch, UnsupportedModel
from biassurgery.surgery.attention import Attention
from biassurgery.surgery.block import added_tokens

PADDING = -1


class Adapter(ABC):
    """One family of host models. Subclass it, then register it with `register_adapter`.

    A model of images and text has two towers; it is matched by an adapter of either modality, each
    of which says what its part is.

    Attributes:
        family: the name in messages and in the support table.
        modality: `text` models read token ids, `image` models read pixels.
        entry: where each forward passes: `model`, whose arguments tell padding and positions; or
            `blocks`, the first of them, where the model has other ways in.
    """

    family: ClassVar[str]
    modality: ClassVar[Literal["text", "image"]]
    entry: ClassVar[Literal["model", "blocks"]] = "model"

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter serves the model; must not import the model's library."""

    def part(self, model: nn.Module) -> nn.Module:
        """What of the model is operated on, and is given to all methods below: one of its towers,
        or the whole.
        """
        return model

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The transformer layers in order; the output of each (or its first element) is the
        residual stream (B, T, D).
        """

    @abstractmethod
    def width(self, model: nn.Module) -> int:
        """Channels of the residual stream."""

    def layout(self, model: nn.Module) -> str:
        """The axes of a block's output: B sequences, T tokens, D channels and, in some, S parallel
        streams (read as S * D channels).
        """
        return "BTD"

    def causal(self, model: nn.Module) -> bool:
        """Whether a token sees none of those behind it."""
        return self.modality == "text"

    def counts_cached_tokens(self, model: nn.Module) -> bool:
        """Whether the cache that a block is given tells, at every layer, how many tokens it holds;
        a recurrent state does not.
        """
        return True

    @abstractmethod
    def roles(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the roles that a token of this model can have."""

    @abstractmethod
    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        """(B, T) int64 on the batch's device: index into `roles` for every token of a hidden state,
        `PADDING` for padding.
        """

    @abstractmethod
    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """One forward over all blocks, without cache and, where that saves work, without the
        head.
        """

    def attends(self, model: nn.Module, block: nn.Module) -> bool:
        """Whether the block has an attention at all; some layers of hybrid models keep a recurrent
        state instead.
        """
        return True

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        """The attention of a block, and how it gets to this library's core; raises
        `UnsupportedModel` if it cannot.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where the attention of"
            f" {type(model).__name__} is; modes on attention need an adapter with attention()."
        )

    def position_modules(self, model: nn.Module) -> list[tuple[nn.Module, tuple[str, int]]]:
        """What embeds positions: each module, with the name and the place of the positions in its
        forward.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where {type(model).__name__} takes"
            " its positions from; transplant needs an adapter with position_modules()."
        )

    def alibi(self, model: nn.Module, attention: nn.Module) -> Tensor | None:
        """(H,) how much the logit of a key grows with its position; None: positions are not in the
        logits.
        """
        return None

    def architecture(self, model: nn.Module) -> str:
        """What sites are keyed to; models with the same name and size can exchange them."""
        return self.family


class TextAdapter(Adapter):
    """Models of token ids with the roles `start` (first real token of a sequence) and
    `elsewhere`.
    """

    modality = "text"

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        return ("start", "elsewhere")

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if ids is None:
            raise BadBatch(
                f"batches: a batch has {sorted(batch)} but neither input_ids nor inputs_embeds; add"
                " input_ids (B, T) int64."
            )
        if tuple(ids.shape[:2]) != shape:
            raise BadBatch(
                f"batches: the tokens have shape {tuple(ids.shape[:2])} but the hidden states have"
                f" {shape}; tokens that the model adds by itself (soft prompts, meta tokens) have"
                " no known role."
            )
        mask = batch.get("attention_mask")
        if mask is None:
            real = torch.ones(shape, dtype=torch.bool, device=ids.device)
        elif mask.dim() == 2:
            real = mask.to(torch.bool)[:, -shape[1] :]
        else:
            raise BadBatch(
                f"batches: attention_mask has shape {tuple(mask.shape)}; give (B, T), 1 for real"
                " tokens and 0 for padding."
            )
        first = real & (real.cumsum(1) == 1)
        positions = batch.get("position_ids")
        if positions is not None and positions.dim() == 2:
            first = first | (
                real & (positions == 0).expand(shape)
            )  # packed sequences start over at position 0
        return torch.where(real, torch.where(first, 0, 1), PADDING)


class ImageAdapter(Adapter):
    """Vision transformers: prefix tokens ([CLS], registers), then patches."""

    modality = "image"
    entry = "blocks"

    @abstractmethod
    def has_cls(self, model: nn.Module) -> bool:
        """Whether the first token is [CLS]."""

    @abstractmethod
    def registers(self, model: nn.Module) -> int:
        """How many register tokens the model has behind it; inside its blocks, a patch may have
        added more.
        """

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        """The second linear layer of a block's MLP, which reads (B, T, neurons) and writes to the
        residual stream.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where the MLP of"
            f" {type(model).__name__} ends; register neurons need an adapter with mlp_out()."
        )

    def prefix_counters(self, model: nn.Module, block: nn.Module) -> list[str]:
        """The modules in a block that know by `num_prefix_tokens` where the patches begin, as
        timm's rotary attention does; their names.

        Raises UnsupportedModel if no token can be added before the patches.
        """
        return [
            name for name, module in block.named_modules() if "num_prefix_tokens" in vars(module)
        ]

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
