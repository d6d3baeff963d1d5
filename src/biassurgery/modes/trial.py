"""What a mode tries a model on where its user gives it nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.data.packaged import packaged_pixels, packaged_text, text_batches
from biassurgery.data.tokenizers import local_tokenizer
from biassurgery.data.transforms import patch_kernel
from biassurgery.errors import CalibrationRequired

LENGTH = 128  # tokens a sequence
ROWS = 16
_BATCH = 4
_SIZE = 224  # of images, where a model does not say


def packaged_batches(host: Host) -> list[Tensor] | None:
    """Packaged text by the model's own tokenizer, or packaged images; None: they cannot be used."""
    if host.adapter.modality == "image":
        try:
            return list(packaged_pixels(host.root).split(_BATCH))
        except CalibrationRequired:
            return None
    name = getattr(getattr(host.root, "config", None), "_name_or_path", "")
    tokenizer = local_tokenizer(name) if name else None
    if tokenizer is None:
        return None
    batches = text_batches(tokenizer, packaged_text("calibration"), _length(host))
    largest = max((int(batch.max()) for batch in batches), default=0)
    if not batches or largest >= (host.adapter.vocabulary(host.model) or largest + 1):
        return None
    return list(torch.cat(batches)[:ROWS].split(_BATCH))


def random_batches(host: Host) -> list[Tensor]:
    """Token ids, or images of normal noise, that show how a model is built."""
    drawn = torch.Generator().manual_seed(0)
    if host.adapter.modality == "image":
        kernel = patch_kernel(host.model)
        channels = 3 if kernel is None else kernel.in_channels
        noise = torch.randn(2, channels, *_image_size(host), generator=drawn)
        return [noise if kernel is None else noise.to(kernel.weight.dtype)]
    reserved = host.adapter.reserved(host.model)
    vocabulary = range(host.adapter.vocabulary(host.model) or 2)
    words = torch.tensor([word for word in vocabulary if word not in reserved] or [0])
    return [words[torch.randint(len(words), (_BATCH, _length(host)), generator=drawn)]]


def _length(host: Host) -> int:
    return min(LENGTH, host.adapter.context(host.model) or LENGTH)


def _image_size(host: Host) -> tuple[int, int]:
    """Height and width of the images that a model was made for."""
    model: Any = host.model
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    holders = (config, getattr(model, "patch_embed", None), model)
    names = ("image_size", "img_size")
    sizes = (getattr(holder, name, None) for holder in holders for name in names)
    size = next((size for size in sizes if size), None) or _size_of_positions(model)
    height, width = size if isinstance(size, Iterable) else (size, size)
    return int(height), int(width)


def _size_of_positions(model: Any) -> int:
    """The side of a square image that has as many patches as a table of positions has rows."""
    table, kernel = getattr(model, "pos_embed", None), patch_kernel(model)
    if not isinstance(table, Tensor) or kernel is None:
        return _SIZE
    return math.isqrt(table.shape[-2]) * int(kernel.stride[0])
