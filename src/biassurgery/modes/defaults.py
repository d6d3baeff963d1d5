"""Which sites a patch takes when it is given none.

The published ones, else a calibration on packaged text or images. Nothing here touches the network:
a tokenizer counts only if it is in a local folder or in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.registry import Host
from biassurgery.data.packaged import (
    LENGTH,
    calibration_advice,
    packaged_pixels,
    packaged_text,
    special_prefix,
    text_batches,
)
from biassurgery.data.tokenizers import local_tokenizer
from biassurgery.errors import CalibrationRequired, warn
from biassurgery.findings.published import is_published
from biassurgery.findings.sites import Sites
from biassurgery.measure.briefly import calibrate_briefly, seconds_of
from biassurgery.measure.calibrate import calibrate

_IMAGES = 8  # a batch


def default_sites(model: nn.Module, host: Host, start: int | None = None) -> Sites:
    """Sites for a model that came with none; a `UserWarning` says where they are from.

    Published sites of `model.config._name_or_path` if there are any, with BOS if the checkpoint's
    tokenizer prepends it; else a calibration on packaged public-domain text with that tokenizer, or
    on packaged photographs, prepared as the model's own library says. Of the text as much is read
    as it takes to know the means, see `until_settled`.

    Args:
        model: the whole.
        host: the model, or its tower.
        start: the id of a token that stands in front of every sequence, in place of what the
            tokenizer puts there; None: none. Published sites are then of no use.

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
    tokenizer = local_tokenizer(name) if name else None
    if name and start is None and is_published(name):
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
    return _from_text(host, name, tokenizer, start)


def _from_published(name: str, tokenizer: Any | None) -> Sites:
    sites = Sites.published(name, None if tokenizer is None else bool(special_prefix(tokenizer)))
    _warn(
        f"using published ones: {sites.origin.source}. They hold for inputs that begin the same"
        f" way; pass sites=Sites.published({name!r}, bos=...) or sites=calibrate(model, batches) to"
        " choose."
    )
    return sites


def _from_text(host: Host, name: str, tokenizer: Any, start: int | None) -> Sites:
    prefix = special_prefix(tokenizer) if start is None else []
    length = _length(host, tokenizer) - (start is not None)
    batches = text_batches(tokenizer, packaged_text("calibration"), length, prefix)
    _check_vocabulary(host, name, batches)
    front = f"{'with' if prefix else 'without'} BOS" if start is None else f"behind token {start}"
    text = f"packaged public-domain English text, tokenizer of {name} {front}"
    size = (
        f"at most {sum(map(len, batches))} sequences of {length} tokens, which takes"
        f" {seconds_of(host, batches)}"
        if batches
        else "nothing"
    )
    _warn(
        f"calibrating on {text}, {size}. Pass sites=calibrate(model, batches) with your own data to"
        " choose."
    )
    sites = calibrate_briefly(host, batches, start)
    tally = sites.tally
    assert tally is not None
    read = f"{tally.sequences} sequences of {length} tokens, {tally.tokens:,} in all"
    origin = replace(sites.origin, source=f"{text}, {read}")
    return Sites(sites, origin=origin, tally=tally)


def _check_vocabulary(host: Host, name: str, batches: list[Tensor]) -> None:
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


def _length(host: Host, tokenizer: Any) -> int:
    """Tokens a sequence: what model and tokenizer take, but no more than `LENGTH`."""
    context = host.adapter.context(host.model) or LENGTH
    return min(LENGTH, tokenizer.model_max_length, context)


def _warn(message: str) -> None:
    warn(f"sites: none were given; {message}")
