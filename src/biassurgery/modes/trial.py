"""What a mode tries a model on where its user gives it nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.data.packaged import (
    local_folder,
    packaged_pixels,
    packaged_text,
    text_batches,
)
from biassurgery.data.tokenizers import read_tokenizer

LENGTH = 128
ROWS = 16
_IMAGES = 4  # a batch


def trial_batches(host: Host) -> list[Tensor]:
    """Packaged text by the model's own tokenizer, else random ids; packaged images.

    Raises:
        CalibrationRequired: the packaged images cannot be used with this model.
    """
    if host.adapter.modality == "image":
        return list(packaged_pixels(host.root).split(_IMAGES))
    length = min(LENGTH, host.adapter.context(host.model) or LENGTH)
    vocabulary = host.adapter.vocabulary(host.model) or 2
    name = getattr(getattr(host.root, "config", None), "_name_or_path", "")
    folder = local_folder(name) if name else None
    if folder is not None:
        tokenizer = read_tokenizer(folder, local_files_only=True)
        if tokenizer is not None:
            batches = text_batches(tokenizer, packaged_text("calibration"), length)
            rows = torch.cat(batches)[:ROWS] if batches else torch.zeros(0)
            if len(rows) and int(rows.max()) < vocabulary:
                return list(rows.split(4))
    drawn = torch.Generator().manual_seed(0)
    reserved = host.adapter.reserved(host.model)
    words = torch.tensor([word for word in range(vocabulary) if word not in reserved] or [0])
    return [words[torch.randint(len(words), (4, length), generator=drawn)]]
