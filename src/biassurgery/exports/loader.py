"""Runs a stock model of transformers behind the key values of a start token.

Nothing but torch, safetensors and transformers is needed. The text is given without its start
token, whose key and value lie in the cache already:

    prefix = Prefix.load("folder of this file")
    logits = model(**prefix.inputs(model, ids, attention_mask)).logits
    sequences = prefix.generate(model, ids, attention_mask, max_new_tokens=20)

Masks are those of the text; padding may be on the left. Rows and beams are seen to.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_COUNTED = ("max_length", "min_length")


@dataclass(frozen=True)
class Prefix:
    """Key and value (layers, key-value heads, channels) of one token in front of every sequence."""

    keys: Tensor
    values: Tensor

    @classmethod
    def load(cls, folder: str | Path) -> Prefix:
        """Read `prefix.safetensors` in a folder."""
        from safetensors.torch import load_file

        tensors = load_file(Path(folder) / "prefix.safetensors")
        return cls(tensors["keys"], tensors["values"])

    def cache(self, model: Any, rows: int) -> Any:
        """A cache of one position a layer for so many sequences, on the model's device."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        like = next(model.parameters())
        for layer, (key, value) in enumerate(zip(self.keys, self.values)):
            in_rows = [t.to(like)[None, :, None].repeat(rows, 1, 1, 1) for t in (key, value)]
            cache.update(in_rows[0], in_rows[1], layer)
        return cache

    def inputs(self, model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> dict:
        """The arguments of one forward of a text (B, T) that begins behind the prefix."""
        mask = _longer(ids, attention_mask)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            _cache_name(model): self.cache(model, len(ids)),
        }
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1)[:, 1:].clamp(min=0)
        return given

    def generate(
        self, model: Any, ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`model.generate` behind the prefix; what it returns begins with the text (B, T).

        Options that return more than the sequences are not for this.
        """
        config = options.get("generation_config") or model.generation_config
        several = [
            options.get(name, getattr(config, name, None) or 1)
            for name in ("num_beams", "num_return_sequences")
        ]
        cache = self.cache(model, len(ids) * max(several))
        # The prefix stands for a token in front, which generate() leaves out, as it is cached.
        whole = torch.cat([ids[:, :1], ids], 1)
        sequences = model.generate(
            whole,
            attention_mask=_longer(ids, attention_mask),
            **{_cache_name(model): cache},
            **_longer_by_one(options, config),
        )
        return sequences[:, 1:]


def _longer(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask (B, 1 + T) of a text and the prefix before it."""
    mask = torch.ones_like(ids) if mask is None else mask
    return torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


def _longer_by_one(options: dict[str, Any], config: Any) -> dict[str, Any]:
    """The options, with those one larger that count the tokens of the whole sequence.

    A config that is given comes back as a copy. Of the model's own only these counts are given: a
    config and options together are deprecated in transformers 5.
    """
    counts = {name: getattr(config, name, None) for name in _COUNTED}
    longer = {name: value + 1 for name, value in counts.items() if value}
    if options.get("generation_config") is not None:
        options = options | {"generation_config": copy.deepcopy(config)}
        for name, value in longer.items():
            setattr(options["generation_config"], name, value)
        longer = {}
    if options.get("max_new_tokens", getattr(config, "max_new_tokens", None)) is not None:
        longer.pop("max_length", None)  # which would be said twice
    own = {name: value + 1 for name, value in options.items() if name in _COUNTED and value}
    return longer | options | own


def _cache_name(model: Any) -> str:
    """What this version of transformers calls the cache."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
