"""The rows of quantised key-value caches: by transformers' own layers, on quanto or hqq."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

PIECE = 32  # tokens; what is before the piece at hand is read from the quantised cache
COLUMNS = ("as it is", "transplant")


class Kind(NamedTuple):
    """A package and its layer of transformers' caches, at so many bits."""

    package: str
    layer: str
    bits: int


KINDS = {
    "KV cache, 4 bits (quanto)": Kind("optimum.quanto", "QuantoQuantizedLayer", 4),
    "KV cache, 2 bits (quanto)": Kind("optimum.quanto", "QuantoQuantizedLayer", 2),
    "KV cache, 8 bits (hqq)": Kind("hqq", "HQQQuantizedLayer", 8),
    "KV cache, 3 bits (hqq)": Kind("hqq", "HQQQuantizedLayer", 3),
}


def installed(row: str) -> bool:
    """Whether the row's package is."""
    package = KINDS[row].package
    return find_spec(package.split(".")[0]) is not None and find_spec(package) is not None


def cache_of(model: Any, row: str) -> Any:
    """What `QuantizedCache` is made of, which refuses sliding windows itself.

    While sequences are shorter than the window, that makes no difference.
    """
    kind = KINDS[row]
    layer = getattr(transformers.cache_utils, kind.layer)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = [layer(nbits=kind.bits, residual_length=1) for _ in range(count)]
    return transformers.cache_utils.Cache(layers=layers)


def losses(model: Any, rows: list[Tensor], drop: int, row: str) -> list[float]:
    """Of each window, read piece by piece; the start token and the one behind are not scored."""
    found = []
    for window in rows:
        cache = cache_of(model, row)
        with torch.no_grad():
            logits = [
                model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in window[:, drop:].split(PIECE, dim=1)
            ]
        predicted = torch.cat(logits, 1)[0, 1 - drop : -1].float()
        found.append(F.cross_entropy(predicted, window[0, 2:]).item())
    return found
