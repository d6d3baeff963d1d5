"""GGUF files as llama.cpp writes them, of planted LLaMAs, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.models import VOCAB, planted

# How llama.cpp calls the linear layers of a block.
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BOS = "<s>"
EOS = "</s>"
LETTERS = [
    BOS,
    EOS,
    "<unk>",
    *(bytes_to_unicode()[byte] for byte in range(32, 32 + VOCAB - 5)),
    "ab",
    "cd",
]
AB_1 = [VOCAB - 2, 3, 3 + ord("1") - 32]  # the tokens of "ab 1"
_CONTROL = 3  # the type of a special token


def write_gguf(
    file: Path, *, architecture: str = "llama", bos: bool = True, tokenizer: bool = True
) -> Any:
    """Write a planted LLaMA, float32, and return it."""
    from gguf import GGUFWriter

    model = planted("llama")
    writer = GGUFWriter(file, architecture)
    _describe(writer, model.config)
    if tokenizer:
        _add_tokenizer(writer, bos)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_name(name), _rotated(name, tensor, model.config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _describe(writer: Any, config: Any) -> None:
    writer.add_name("planted")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, bos: bool) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(LETTERS)
    writer.add_token_types([_CONTROL] * 3 + [1] * (len(LETTERS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_add_bos_token(bos)


def _name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LINEARS[rest.removesuffix('.weight')]}.weight"


def _rotated(name: str, tensor: Tensor, config: Any) -> Tensor:
    """llama.cpp pairs neighbouring rows of q and k for RoPE, transformers the two halves."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return tensor.contiguous()
    rows = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2)
    return torch.clone(rows.reshape(tensor.shape), memory_format=torch.contiguous_format)
