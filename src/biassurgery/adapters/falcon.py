"""Falcon: parallel blocks, rotary or ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import Positions
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_text import TransformersDecoder, text_config
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, Shape
from biassurgery.surgery.routes import ThroughSdpa, WithConfig


@register_adapter
class Falcon(TransformersDecoder):
    family = "falcon"
    model_types = ("falcon",)
    block_path = "h"
    own_mask = True

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        module: Any = block.self_attention
        if type(module).__name__ != "FalconAttention":
            raise UnsupportedModel(
                f"model: the attention is {type(module).__name__}; load the model with"
                " attn_implementation='sdpa'."
            )
        heads = module.num_heads
        size = module.head_dim
        kv_heads = 1 if module.multi_query and not module.new_decoder_architecture else heads
        shape = Shape(heads, kv_heads, size, size, module.hidden_size)
        return Attention(module, ThroughFalcon, shape)

    def positions(self, model: nn.Module) -> Positions:
        return [] if text_config(model).alibi else super().positions(model)

    def alibi(self, model: nn.Module, attention: nn.Module) -> Tensor | None:
        if not text_config(model).alibi:
            return None
        from transformers.models.falcon.modeling_falcon import build_alibi_tensor

        module: Any = attention
        mask = torch.ones(1, 2)
        at_0_and_1 = build_alibi_tensor(mask, module.num_heads, torch.float32)  # (H, 1, 2)
        return (at_0_and_1[:, 0, 1] - at_0_and_1[:, 0, 0]) * module.head_dim**-0.5


class ThroughFalcon(ThroughSdpa, WithConfig):
    """Falcon's own call of sdpa, with ALiBi in the mask, whatever that was made for."""

    implementation = "sdpa"

    def through(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("output_attentions"):
            raise UnsupportedModel(
                "output_attentions: True; the attention of a patched Falcon returns no weights, use"
                " record(model, what=('probs',)) instead."
            )
        if alibi is not None and self.host_config._attn_implementation != "sdpa":
            heads: int = self.num_heads  # type: ignore[attr-defined]
            norm: float = self.inv_norm_factor  # type: ignore[attr-defined]
            bias = alibi.view(-1, heads, 1, alibi.shape[-1]) * norm
            attention_mask = bias if attention_mask is None else bias + attention_mask
        return super().through(hidden_states, alibi, attention_mask, *args, **kwargs)
