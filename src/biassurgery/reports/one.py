"""The one sequence that a report shows, and the outputs of an image model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.registry import Host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import UnsupportedModel
from biassurgery.evaluate.features import image_features
from biassurgery.measure.reading import reading
from biassurgery.measure.record import record
from biassurgery.plots.figures import readable

_TOKENS = 48


def first_row(host: Host, batch: dict[str, Any]) -> dict[str, Any]:
    """The first sequence of a batch, without padding; of a text its first tokens."""
    if host.adapter.modality != "text":
        return {name: value[:1] for name, value in batch.items() if isinstance(value, Tensor)}
    ids = batch["input_ids"][0]
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        ids = ids[mask[0].bool()]
    return {"input_ids": ids[None, :_TOKENS]}


def labels_of(host: Host, batch: dict[str, Any], tokenizer: Any) -> list[str]:
    """A string for each token of one sequence."""
    if host.adapter.modality == "text":
        ids = batch["input_ids"][0].tolist()
        if tokenizer is None:
            return [str(token) for token in ids]
        return [readable(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    count = _tokens(host, batch)
    codes = host.adapter.token_roles(host.model, batch, (1, count))[0].tolist()
    roles = [host.roles[code] for code in codes]
    alone = {role for role, times in Counter(roles).items() if times == 1}
    number = dict.fromkeys(roles, -1)
    labels = []
    for role in roles:  # also those behind the patches
        number[role] += 1
        labels.append(role if role in alone else f"{role} {number[role]}")
    return labels


def _tokens(host: Host, batch: dict[str, Any]) -> int:
    """How many tokens an image has in the residual stream."""
    with record(host.root, "block_output", layers=0) as rec, reading(host.model):
        host.adapter.run(host.model, batch)
    return rec["block_output"][0].shape[1]


def outputs(model: nn.Module, host: Host, data: Batch | Iterable[Batch]) -> Tensor:
    """(N, D) float64 on the CPU: the features of images, a row an image.

    Raises:
        UnsupportedModel: the model reads none.
    """
    modality = host.adapter.modality
    if modality != "image":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[modality]}, of which there is no"
            " measure here; give report(model, batches, path, evaluate=...)."
        )
    rows = [image_features(model, batch["pixel_values"]) for batch in as_batches(host, data)]
    return torch.cat(rows).double().cpu()
