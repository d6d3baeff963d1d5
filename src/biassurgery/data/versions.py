"""Folders that transformers 5 wrote, as version 4 reads them.

Version 5 keeps the base of rotary positions in `rope_parameters`, which version 4 passes over: it
takes the architecture's default instead, without a word, and the model is another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isclose
from pathlib import Path
from typing import Any

from torch import Tensor

from biassurgery.errors import FileError

Fields = dict[str, Any]
_FIELDS = {"rope_theta", "partial_rotary_factor"}  # beside the scaling, in version 4


def name_for_both(folder: Path) -> None:
    """Say in a folder of version 5 what version 4 looks for; version 5 reads it as before."""
    _change(folder / "config.json", _rotation_for_4)
    _change(folder / "tokenizer_config.json", _tokenizer_for_4)


def check_read(model: Any, name: str) -> None:
    """Refuse a model whose rotary positions this version of transformers has not read.

    Args:
        model: as transformers has read it.
        name: what it was asked for by.

    Raises:
        FileError: they are others than the folder says.
    """
    import transformers

    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if int(transformers.__version__.split(".")[0]) >= 5 or not parameters:
        return
    wanted = {layers["rope_theta"] for layers in _by_layers(parameters) if "rope_theta" in layers}
    scaled = any(
        layers.get("rope_type", "default") != "default" for layers in _by_layers(parameters)
    )
    frequencies = [part.inv_freq for part in model.modules() if hasattr(part, "inv_freq")]
    found = {_base(each) for each in frequencies if len(each) > 1}  # a single one is always 1
    unread = [theta for theta in wanted if not any(isclose(theta, b, rel_tol=1e-3) for b in found)]
    pairs = {len(each) for each in frequencies}
    unread += [part for part in _pairs(config, parameters) if part not in pairs]
    if (found and unread) or (scaled and not getattr(config, "rope_scaling", None)):
        raise FileError(
            f"model: {name} was written by transformers 5, and {transformers.__version__} does not"
            f" read its rotary positions (rope_parameters {parameters}; in use are the bases"
            f" {sorted(found)}, of {sorted(pairs)} pairs of channels); load it with version 5, or"
            " try what `biassurgery convert` writes there."
        )


def _by_layers(parameters: Fields) -> list[Fields]:
    """The parameters of each kind of layers; most models have one kind."""
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)]
    return kinds or [parameters]


def _pairs(config: Any, parameters: Fields) -> list[int]:
    """How many pairs of channels of a head turn, where the folder says which share of it does."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    named = [layers for layers in _by_layers(parameters) if "partial_rotary_factor" in layers]
    return [(int(size * layers["partial_rotary_factor"]) + 1) // 2 for layers in named]


def _base(frequencies: Tensor) -> float:
    """What the frequencies (pairs,) are powers of: the ratio of the first two is base^(-1/pairs).

    Scaling leaves that ratio alone, or is of the low frequencies only.
    """
    first, second = frequencies[:2].double()
    return round(float((first / second) ** len(frequencies)), 2)


def _change(file: Path, change: Callable[[Fields], Fields]) -> None:
    if file.is_file():
        fields = json.loads(file.read_text(encoding="utf-8"))
        text = json.dumps(change(fields), indent=2, sort_keys=True)
        file.write_text(f"{text}\n", encoding="utf-8")


def _tokenizer_for_4(fields: Fields) -> Fields:
    """The old name of the class for a tokenizer that is all in tokenizer.json."""
    if fields.get("tokenizer_class") != "TokenizersBackend":
        return fields
    return {**fields, "tokenizer_class": "PreTrainedTokenizerFast"}


def _rotation_for_4(fields: Fields) -> Fields:
    """With the fields of version 4 that say what `rope_parameters` says."""
    parameters = fields.get("rope_parameters") or {}
    everywhere = parameters.get("full_attention", parameters)
    added: Fields = {}
    if isinstance(fields.get("text_config"), dict):  # of a model that reads images as well
        added["text_config"] = _rotation_for_4(fields["text_config"])
    for field in everywhere.keys() & _FIELDS:
        added[field] = everywhere[field]
    if "rope_theta" in parameters.get("sliding_attention", {}):
        added["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if everywhere.get("rope_type", "default") != "default":
        scaling = {key: everywhere[key] for key in everywhere.keys() - _FIELDS}
        added["rope_scaling"] = {**scaling, "type": everywhere["rope_type"]}
    return {**fields, **added}
