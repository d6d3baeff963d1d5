"""Testers of our own: tiny models, and inputs for them, as `ModelTesterMixin` wants them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

BATCH = 3
LENGTH = 7
VOCABULARY = 99
LAYERS = 2
HEADS = 4
WIDTH = 32
IMAGE = 16
PATCH = 4
PATCHES = (IMAGE // PATCH) ** 2

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """A model type: its classes by name, the base first; its config; what it reads."""

    config: str
    classes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    modality: str = "text"


FAMILIES = {
    "llama": Family("LlamaConfig", ("LlamaModel", "LlamaForCausalLM"), _DECODER),
    "mistral": Family("MistralConfig", ("MistralModel", "MistralForCausalLM"), _DECODER),
    "qwen3": Family("Qwen3Config", ("Qwen3Model", "Qwen3ForCausalLM"), _DECODER | {"head_dim": 8}),
    "phi3": Family("Phi3Config", ("Phi3Model", "Phi3ForCausalLM"), _DECODER),
    "olmo2": Family("Olmo2Config", ("Olmo2Model", "Olmo2ForCausalLM"), _DECODER),
    "gemma3": Family(
        "Gemma3TextConfig",
        ("Gemma3TextModel", "Gemma3ForCausalLM"),
        _DECODER
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        ("GptOssModel", "GptOssForCausalLM"),
        _DECODER
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
    ),
    "gpt2": Family(
        "GPT2Config",
        ("GPT2Model", "GPT2LMHeadModel"),
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "clip": Family("CLIPVisionConfig", ("CLIPVisionModel",), _VISION, "image"),
    "dinov2": Family(
        "Dinov2Config", ("Dinov2Model", "Dinov2ForImageClassification"), _VISION, "image"
    ),
}


class Tester:
    """Makes the config and the inputs of one family.

    Its attributes are those that the common tests read.
    """

    batch_size = BATCH
    num_hidden_layers = LAYERS
    num_attention_heads = HEADS
    hidden_size = WIDTH
    image_size = IMAGE
    patch_size = PATCH
    is_training = True

    def __init__(self, family: Family) -> None:
        self.family = family
        self.seq_length = LENGTH if family.modality == "text" else PATCHES + 1

    def get_config(self) -> Any:
        return getattr(transformers, self.family.config)(**self.family.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        if self.family.modality == "image":
            return self.get_config(), {"pixel_values": torch.rand(BATCH, 3, IMAGE, IMAGE)}
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids).tril(),
        }

    def classes(self) -> tuple[type, ...]:
        return tuple(getattr(transformers, name) for name in self.family.classes)
