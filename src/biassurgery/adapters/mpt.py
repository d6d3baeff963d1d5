"""MPT: ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import Positions
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_text import TransformersDecoder
from biassurgery.surgery.arguments import for_softmax
from biassurgery.surgery.attention import Attention, EditedAttention, Shape
from biassurgery.surgery.call import Call


@register_adapter
class Mpt(TransformersDecoder):
    family = "mpt"
    model_types = ("mpt",)
    block_path = "blocks"

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        module: Any = block.attn
        heads = module.n_heads
        size = module.head_dim
        shape = Shape(heads, heads, size, size, module.hidden_size)
        return Attention(module, ThroughMpt, shape)

    def positions(self, model: nn.Module) -> Positions:
        return []

    def alibi(self, model: nn.Module, attention: nn.Module) -> Tensor | None:
        from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

        module: Any = attention
        last_two = build_mpt_alibi_tensor(module.n_heads, 2)  # (H, 1, 2)
        return last_two[:, 0, 1] - last_two[:, 0, 0]


class ThroughMpt(EditedAttention):
    """MPT, which computes its softmax itself.

    Queries, keys, values and the output projection are the module's, the rest is the core's.
    """

    def through(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        cache_position: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        for_softmax(module, others, None, ())
        cache = past_key_values if cache is None else cache  # its name since transformers 5.24
        mixed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
        q, k, v = (
            part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, -1)
        )
        if cache is not None:
            k, v = cache.update(k, v, module.layer_idx, {"cache_position": cache_position})
        mask = None
        if position_bias is not None:
            mask = _from_each_query(position_bias[:, :, -k.shape[2] :], q.shape[2]).to(q.dtype)
        if attention_mask is not None:  # True where a query must not look
            mask = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else mask
            mask = mask.masked_fill(attention_mask, torch.finfo(q.dtype).min)
        dropout = module.attn_dropout_p if module.training else 0.0
        call = Call(q, k, v, mask, False, module.softmax_scale, dropout)
        out = module.attended(call)
        return module.out_proj(out.transpose(1, 2).flatten(2)), None


def _from_each_query(alibi: Tensor, queries: int) -> Tensor:
    """ALiBi (H, 1, S) of keys before the last query -> (1, H, T, S) of keys before each.

    To the softmax of the keys it is the same; next to a bias column only this does not depend on
    how many tokens are run at once. With slope 1, three keys and two queries, -2 -1 0 becomes
    -1 0 1 for the first query and stays -2 -1 0 for the second.
    """
    return (alibi - alibi[..., -queries:].mT)[None]
