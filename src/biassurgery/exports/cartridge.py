"""The format `cartridge`: key values of a start token as an adapter of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from biassurgery.adapters.registry import Host
from biassurgery.adapters.transformers_text import text_config
from biassurgery.errors import MissingPackage, warn
from biassurgery.exports.formats import Format
from biassurgery.exports.prefix import checked
from biassurgery.findings.files import write_tensors
from biassurgery.findings.key_values import KeyValues


class Cartridge(Format):
    """An adapter of one virtual token, for `PeftModel.from_pretrained(model, folder)`.

    PEFT's forward runs it. Its `generate` drops the prefix, in silence, with peft 0.21.2 on
    transformers 5.24, which has renamed the cache's argument; `format="prefix"` generates.
    """

    name: ClassVar[str] = "cartridge"
    text_only: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False

    def write(self, host: Host, folder: Path, key_values: KeyValues | None) -> None:
        found = checked(host, key_values, self.name)
        config = _config(host, found)
        # As PEFT's own utilities lay out a cache: key and value of each layer in turn.
        pairs = torch.stack([found.keys, found.values], 1)  # (layers, 2, heads, channels)
        write_tensors(
            folder / "adapter_model.safetensors", {"prompt_embeddings": pairs.reshape(1, -1)}, {}
        )
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        warn(
            "cartridge: PEFT's generate() drops the prefix with peft 0.21.2 on transformers 5.24;"
            " its forward does not. Compare before you serve it, or use format='prefix'.",
        )


def _config(host: Host, found: KeyValues) -> dict[str, Any]:
    try:
        from peft import CartridgeConfig
    except ImportError as error:
        raise MissingPackage(
            "format: 'cartridge' is an adapter of peft, which is not installed, or older than"
            " 0.19; pip install -U peft."
        ) from error
    layers, heads, channels = found.keys.shape
    name = getattr(text_config(host.model), "_name_or_path", None)
    config = CartridgeConfig(
        base_model_name_or_path=name or None,
        task_type="CAUSAL_LM",
        num_virtual_tokens=1,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * channels,
        inference_mode=True,
        num_frozen_tokens=1,
    )
    named = config.to_dict()
    return {key: getattr(value, "value", value) for key, value in named.items()}
