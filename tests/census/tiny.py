"""A tiny random model of any causal-LM type that the installed transformers know, by shrinking the
sizes in its default config.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

LAYERS = 4
WIDTH = 32
HEADS = 4
VOCAB = 64

# Every name of one quantity gets the same size; encoders and towers are as deep as decoders, so
# that depth alone cannot tell them apart.
SIZES = {
    name: size
    for size, names in [
        (
            LAYERS,
            (
                "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers"
                " num_decoder_layers num_encoder_layers num_blocks depth conf_num_hidden_layers"
            ),
        ),
        (
            WIDTH,
            (
                "hidden_size d_model n_embd emb_dim embedding_dim lru_width hidden_size_global"
                " backbone_hidden_size adapter_input_size dim_model_base out_hidden_size input_size"
                " projector_input_dim projector_output_dim adapter_in_dim adapter_out_dim"
                " output_channels vision_output_dim downsample_hidden_size"
            ),
        ),
        (
            2 * WIDTH,
            (
                "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff d_inner dim_ff"
                " n_inner ffn_hidden_size feed_forward_size intermediate_size_mlp"
                " expert_ffn_hidden_size dense_intermediate_size mlp_dim mamba_d_ssm"
                " attention_hidden_size"
            ),
        ),
        (
            WIDTH // 2,
            (
                "embedding_size input_embedding_size output_embedding_size word_embed_proj_dim"
                " qk_head_dim moe_intermediate_size shared_expert_intermediate_size"
                " shared_experts_intermediate_size shared_intermediate_size router_hidden_size"
                " moe_shared_expert_intermediate_size pronunciation_embed_dim shape_embed_dim"
                " attention_head_dim"
            ),
        ),
        (
            8,
            (
                "head_dim d_head dim_head kv_channels attention_head_size linear_head_dim"
                " linear_key_head_dim linear_value_head_dim swa_head_dim v_head_dim"
                " qk_nope_head_dim qk_rope_head_dim index_head_dim mamba_head_dim mamba_d_head"
                " mamba_num_heads mamba_n_heads q_lora_rank kv_lora_rank o_lora_rank laurel_rank"
                " adapter_rank gated_norm_rank hc_lowrank d_rel time_step_rank mamba_dt_rank"
                " state_size ssm_state_size mamba_d_state sliding_window attention_window_size"
                " window_size sliding_window_size local_attention attention_chunk_size index_topk"
                " hidden_size_per_layer_input patch_size"
            ),
        ),
        (
            4,
            (
                "rotary_dim chunk_size mamba_chunk_size num_experts n_routed_experts"
                " num_local_experts moe_num_experts zero_expert_num"
            ),
        ),
        (
            HEADS,
            (
                "num_attention_heads n_head n_heads num_heads decoder_attention_heads"
                " encoder_attention_heads attention_heads num_decoder_attention_heads"
                " num_encoder_attention_heads swa_num_attention_heads index_n_heads"
                " linear_num_heads n_mamba_heads linear_num_key_heads linear_num_value_heads"
                " conf_num_attention_heads num_query_groups"
            ),
        ),
        (
            2,
            (
                "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"
                " num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"
            ),
        ),
        (
            1,
            (
                "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers"
                " decoder_start_token_id num_kv_shared_layers"
            ),
        ),
        (0, "pad_token_id"),
        (
            VOCAB,
            (
                "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size"
                " unpadded_vocab_size max_position_embeddings n_positions n_ctx max_seq_len"
                " context_length max_target_positions max_source_positions model_max_length"
                " image_size original_max_position_embeddings pronunciation_vocab_size"
                " shape_vocab_size"
            ),
        ),
    ]
    for name in names.split()
}

GROUPED = {
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
}  # equal in the default: equal here

# Where one size of a type must fit another one, where the default has no value that can be built,
# and where four layers of the default
# pattern would not show every kind of layer of a hybrid.
MAJOR = int(transformers.__version__.split(".")[0])
MAMBA, ATTENTION = ("linear_attention", "full_attention") if MAJOR > 4 else ("mamba", "attention")
DOTS = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": [MAMBA, ATTENTION] * 2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": DOTS,
    "dots3_note_text": DOTS,
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma3n": {
        "text_config": {"intermediate_size": 64},
        "vision_config": {"architecture": "mobilenetv3_small_050"},
    },
    "gemma3n_text": {"intermediate_size": 64},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": [MAMBA, ATTENTION] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": [MAMBA, ATTENTION] * 2},
    "lfm2_moe": {"layer_types": ["conv", ATTENTION] * 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "mllama": {"rope_scaling": {"rope_type": "default"}},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "num_buckets": 2,
    },
    "rwkv": {"attention_hidden_size": 32},
    "transfo-xl": {"cutoffs": [8, 16, 32], "d_embed": 32},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False, "layers_block_type": [MAMBA, "hybrid"] * 2},
    "zamba2": {"layers_block_type": [MAMBA, "hybrid"] * 2},
}
OVERRIDES["qwen4_exp"] = OVERRIDES["qwen4_exp_text"]


def tiny_model(model_type: str) -> Any:
    """A random causal LM of the type in evaluation mode."""
    torch.manual_seed(0)
    outer = transformers.CONFIG_MAPPING[model_type]
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[outer]
    own = (
        kind.config_class.base_config_key or model_type == "llama4"
    )  # a decoder inside a larger type has a config of its own
    config = shrink(kind.config_class if own else outer, OVERRIDES.get(model_type, {}))
    config.is_decoder = True
    return kind._from_config(config).eval()


def needs_cache(model: Any) -> bool:
    """Whether a model is another one without a cache: Gemma 3n of transformers 4 shares keys by it.

    And those of a recurrence over segments.
    """
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    return bool(getattr(model.config, "mem_len", None) or (MAJOR < 5 and shared))


def shrink(kind: Any, given: dict[str, Any], *, dicts: bool = False) -> Any:
    """A config with small sizes; whatever follows from sizes is left for the config to derive.

    Args:
        kind: its class.
        given: arguments of it.
        dicts: whether the configs inside it are handed over as dicts.
    """
    small = {}
    default = vars(kind())
    for name, value in default.items():
        if isinstance(value, transformers.PretrainedConfig):
            small[name] = shrink(type(value), given.get(name, {}), dicts=dicts)
            if dicts or (MAJOR < 5 and kind.model_type in ("fuyu", "git", "moshi")):  # no objects
                small[name] = small[name].to_dict()
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and name in SIZES:
            equal = name in GROUPED and value == default.get(GROUPED[name])
            small[name] = HEADS if equal else min(value, SIZES[name])
    return kind(
        **small
        | {
            name: value
            for name, value in given.items()
            if name not in small or isinstance(value, int)
        }
    )
