"""Images with their labels, from whatever loaders yield to what a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_inputs
from biassurgery.data.transforms import image_dtype
from biassurgery.errors import BadBatch, UnsupportedModel

# a pair, or a dict with `labels` among the model's arguments
LabelledBatch = tuple[Batch, Tensor] | list[Any] | Mapping[str, Any]


def image_host(model: nn.Module, measure: str) -> Host:
    """The model as its adapter sees it, or `UnsupportedModel` if it reads text only."""
    host = find_host(model)
    if host.adapter.modality != "image":
        advice = "; use perplexity(model, data)" if host.adapter.modality == "text" else ""
        raise UnsupportedModel(
            f"model: {type(host.root).__name__} reads {READS[host.adapter.modality]}, and {measure}"
            f" is of images{advice}."
        )
    return host


def labelled(
    host: Host, batches: Iterable[LabelledBatch]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield checked inputs, on the model's device and in its dtype, with labels (B,) of integers.

    Raises:
        BadBatch: a batch that is no pair of images and labels, or whose labels are not one integer
            an image.
    """
    device = input_device(host.root)
    dtype = image_dtype(host.model)
    for batch in batches:
        images, labels = _pair(batch)
        inputs = as_inputs(host, images, device)
        pixels = inputs["pixel_values"]
        if labels.shape != pixels.shape[:1] or labels.is_floating_point():
            raise BadBatch(
                f"batches: labels are {labels.dtype} {tuple(labels.shape)} for {len(pixels)}"
                " images; give one class index (int64) an image."
            )
        yield {**inputs, "pixel_values": pixels if dtype is None else pixels.to(dtype)}, labels


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise BadBatch(
            f"batches: a batch is a {type(batch).__name__}; give pairs of images (B, C, H, W) and"
            " labels (B,) int64, in a list even if there is only one."
        )
    return batch[0], batch[1]
