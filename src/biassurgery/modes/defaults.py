"""Which sites a patch takes when it is given none.

The published ones, else a calibration on packaged text or images. Nothing here touches the network:
a tokenizer counts only if it is in a local folder or in the cache.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from biassurgery.adapters.registry import Host
from biassurgery.data.packaged import (
    LENGTH,
    calibration_advice,
    local_folder,
    packaged_pixels,
    packaged_text,
    special_prefix,
    text_batches,
)
from biassurgery.data.tokenizers import read_tokenizer
from biassurgery.errors import CalibrationRequired
from biassurgery.findings.published import is_published
from biassurgery.findings.sites import Sites
from biassurgery.measure.calibrate import calibrate

_IMAGES = 8  # a batch
_CALLER = 5  # frames from a warning to the caller of `patch_model`


def default_sites(model: nn.Module, host: Host) -> Sites:
    """Sites for a model that came with none; a `UserWarning` says where they are from.

    Published sites of `model.config._name_or_path` if there are any, with BOS if the checkpoint's
    tokenizer prepends it; else a calibration on packaged public-domain text with that tokenizer, or
    on packaged photographs, prepared as the model's own library says.

    Raises:
        CalibrationRequired: neither is possible; the message shows the call to make.
    """
    if host.adapter.modality == "image":
        return _from_images(model, host)
    if host.adapter.modality == "audio":
        raise CalibrationRequired(
            calibration_advice(
                "it reads sound, of which none is packaged",
                "input_features: (B, mels, frames), from the model's feature extractor",
            )
        )
    name = getattr(getattr(host.root, "config", None), "_name_or_path", "")
    tokenizer = _tokenizer(name) if name else None
    if name and is_published(name):
        return _from_published(name, tokenizer)
    if tokenizer is None:
        where = (
            f"it has no tokenizer at {name!r}, locally or in the cache"
            if name
            else "it was not loaded from a named checkpoint"
        )
        raise CalibrationRequired(
            calibration_advice(
                f"{where}, so the packaged text cannot be used", "input_ids: (B, T) int64"
            )
        )
    return _from_text(model, host, name, tokenizer)


def _from_published(name: str, tokenizer: Any | None) -> Sites:
    sites = Sites.published(name, None if tokenizer is None else bool(special_prefix(tokenizer)))
    _warn(
        f"using published ones: {sites.origin.source}. They hold for inputs that begin the same"
        f" way; pass sites=Sites.published({name!r}, bos=...) or sites=calibrate(model, batches) to"
        " choose."
    )
    return sites


def _from_text(model: nn.Module, host: Host, name: str, tokenizer: Any) -> Sites:
    batches = text_batches(tokenizer, packaged_text("calibration"), _length(host, tokenizer))
    vocabulary = host.adapter.vocabulary(host.model)
    largest = max((int(batch.max()) for batch in batches), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationRequired(
            calibration_advice(
                f"the tokenizer at {name!r} makes token {largest}, but the model has {vocabulary},"
                " so the packaged text cannot be used",
                "input_ids: (B, T) int64",
            )
        )
    shape = (
        f"{sum(map(len, batches))} sequences of {batches[0].shape[1]} tokens"
        if batches
        else "nothing"
    )
    source = (
        f"packaged public-domain English text, tokenizer of {name}"
        f" {'with' if special_prefix(tokenizer) else 'without'} BOS, {shape}"
    )
    _warn(
        f"calibrating on {source}. Pass sites=calibrate(model, batches) with your own data to"
        " choose."
    )
    # Every rank measures the same data for itself.
    return calibrate(model, batches, source=source, tower=host.tower, group=False)


def _from_images(model: nn.Module, host: Host) -> Sites:
    images = packaged_pixels(host.root)
    size = f"{images.shape[-2]} x {images.shape[-1]}"
    source = (
        f"packaged photographs, {len(images)} crops and flips of 3, {size}, normalised for this"
        " model"
    )
    _warn(
        f"calibrating on {source}. Pass sites=calibrate(model, batches) with your own images to"
        " choose."
    )
    batches = list(images.split(_IMAGES))
    return calibrate(model, batches, source=source, tower=host.tower, group=False)


def _tokenizer(name: str) -> Any | None:
    """The checkpoint's own tokenizer; None if it is in no local folder and not in the cache."""
    folder = local_folder(name)
    return None if folder is None else read_tokenizer(folder, local_files_only=True)


def _length(host: Host, tokenizer: Any) -> int:
    """Tokens a sequence: what model and tokenizer take, but no more than `LENGTH`."""
    context = host.adapter.context(host.model) or LENGTH
    return min(LENGTH, tokenizer.model_max_length, context)


def _warn(message: str) -> None:
    warnings.warn(f"sites: none were given; {message}", UserWarning, stacklevel=_CALLER)
