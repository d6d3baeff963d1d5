"""`nn.MultiheadAttention`, whose softmax is inside torch: from its projections to the core.

Its inference fast path is one kernel, which nothing can be led through; a changed module does not
take it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.decompose import attention_logits
from biassurgery.surgery.attention import EditedAttention
from biassurgery.surgery.call import Call


def check_multihead(module: nn.MultiheadAttention) -> None:
    """Raise `UnsupportedModel` for variants that add keys of their own."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise UnsupportedModel(
            "model: its nn.MultiheadAttention has add_bias_kv or add_zero_attn, keys of its own"
            " that this library does not know; modes on attention do not apply to it."
        )


class ThroughMultihead(EditedAttention):
    """Attention by `nn.MultiheadAttention`, either axis first."""

    batch_first: bool
    dropout: float
    num_heads: int
    training: bool
    out_proj: nn.Linear
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._rows_first(args[0] if args else kwargs["query"])

    def returned(self, output: Any) -> Tensor:
        return self._rows_first(output[0])

    def through(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; `is_causal` only hints at what `attn_mask` says."""
        if query.dim() != 3 or query.is_nested:
            raise UnsupportedModel(
                f"model: nn.MultiheadAttention was given a query of {query.dim()} dimensions, or"
                " nested tensors; a patched or watched model takes batches (B, T, D)."
            )
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        call = Call(q, k, v, mask, False, q.shape[-1] ** -0.5, dropout)
        out, lse = self.attend_with_edits(call)
        # As in torch, which takes the weight and does not call the module: a LoRA on it has no
        # effect there either.
        heads = out.transpose(1, 2).flatten(2)
        output = functional.linear(heads, self.out_proj.weight, self.out_proj.bias)
        output = self._rows_first(output)
        if not need_weights:
            return output, None
        logits = attention_logits(q, k, mask=mask, scale=call.scale)
        weights = (logits - lse[..., None]).exp().to(q.dtype)
        return output, weights.mean(1) if average_attn_weights else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight = self.in_proj_weight
        bias = self.in_proj_bias
        if weight is not None and query is key and key is value:
            return functional.linear(query, weight, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if weight is not None:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(
            functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)
        )

    def _heads(self, x: Tensor) -> Tensor:
        return self._rows_first(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _rows_first(self, x: Tensor) -> Tensor:
        """From (T, B, D), where the module has it so, to (B, T, D), or back."""
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the logits.

        torch's bool masks are True where attention is forbidden.
        """
        parts = []
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
            parts.append(_added(mask, q.dtype))
        if padding is not None:
            parts.append(_added(padding, q.dtype)[:, None, None])
        total = sum(parts[1:], parts[0]) if parts else None
        return total if total is None or total.dim() == 4 else total[None, None]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
