"""Models, streams of tokens, and what a SinkCache must compute, by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

OLD = transformers.__version__.startswith("4.")
ROTARY = ("llama", "mistral", "mixtral", "falcon", "phi", "gpt_neox")
MOVABLE = ROTARY if OLD else (*ROTARY, "mpt")
WINDOW = 12
SINKS = 4


def random_llama(seed: int = 0, **changes: Any) -> Any:
    """Two layers, grouped keys, in float64: nothing is planted, so that every token weighs."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.5,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 49,
        "pad_token_id": 48,
    }
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes)).eval().double()
    )


def words(rows: int, length: int, seed: int = 3, vocabulary: int = 48) -> Tensor:
    return torch.randint(
        1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def stream(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """(B, T, V) logits, token by token."""
    logits = [
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        for at in range(ids.shape[1])
    ]
    return torch.cat(logits, 1) if logits else torch.zeros(len(ids), 0, 1)


def kept(ids: Tensor, at: int, window: int, sinks: int) -> Tensor:
    """The tokens that the one at `at` sees."""
    seen = ids[:, : at + 1]
    return seen if at < window else torch.cat((seen[:, :sinks], seen[:, sinks - window :]), 1)


def by_hand(model: Any, ids: Tensor, window: int, sinks: int) -> Tensor:
    """(B, T, V) logits of a llama: unrotated keys in lists, evicted by hand, rotated by their place
    in the list; dense, float64.
    """
    body = model.model
    config = model.config
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def norm(weight: Tensor, x: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotated(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(
            torch.ones_like(frequencies), position * frequencies
        )
        return torch.cat((pairs.real, pairs.imag), -1)

    cached: list[list[tuple[Tensor, Tensor]]] = [[] for _ in body.layers]
    logits = []
    for token in ids.T:
        hidden = body.embed_tokens(token)
        for layer, pairs in zip(body.layers, cached):
            attention = layer.self_attn
            x = norm(layer.input_layernorm.weight, hidden)
            query = attention.q_proj(x).view(-1, heads, size)
            pairs.append(
                (
                    attention.k_proj(x).view(-1, groups, size),
                    attention.v_proj(x).view(-1, groups, size),
                )
            )
            if len(pairs) > window:
                del pairs[sinks]
            keys = torch.stack(
                [rotated(key, place) for place, (key, _) in enumerate(pairs)], 2
            ).repeat_interleave(heads // groups, 1)
            values = torch.stack([value for _, value in pairs], 2).repeat_interleave(
                heads // groups, 1
            )
            scores = torch.einsum(
                "bhd,bhtd->bht", rotated(query, len(pairs) - 1), keys
            ) / math.sqrt(size)
            hidden = hidden + attention.o_proj(
                torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values).flatten(1)
            )
            x = norm(layer.post_attention_layernorm.weight, hidden)
            hidden = hidden + layer.mlp.down_proj(
                F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
            )
        logits.append(model.lm_head(norm(body.norm.weight, hidden)))
    return torch.stack(logits, 1)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
