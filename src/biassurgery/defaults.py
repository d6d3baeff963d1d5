"""Which sites a patch takes when it is given none: the published ones, else a calibration on packaged text or images.

Nothing here touches the network: a tokenizer counts only if it is in a local folder or in the cache.
"""

from __future__ import annotations

import warnings
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host
from biassurgery.calibrate import calibrate
from biassurgery.errors import BadOption, CalibrationRequired
from biassurgery.published import is_published
from biassurgery.sites import Sites
from biassurgery.tokenizers import read_tokenizer
from biassurgery.transforms import Transform, image_transform, patch_kernel

if TYPE_CHECKING:
    from PIL.Image import Image

_LENGTH = 512  # tokens a sequence at most
_TOKENS = 4096  # a batch
_IMAGES = 8  # a batch
_CALLER = 5  # frames from a warning to the caller of `patch_model`


def default_sites(model: nn.Module, host: Host) -> Sites:
    """Sites for a model that came with none; a `UserWarning` says where they are from.

    Published sites of `model.config._name_or_path` if there are any, with BOS if the checkpoint's tokenizer prepends it; else a
    calibration on packaged public-domain text with that tokenizer, or on packaged photographs, prepared as the model's own library says.

    Raises:
        CalibrationRequired: neither is possible; the message shows the call to make.
    """
    if host.adapter.modality == "image":
        return _from_images(model, host)
    name = getattr(getattr(host.root, "config", None), "_name_or_path", "")
    tokenizer = _tokenizer(name) if name else None
    if name and is_published(name):
        return _from_published(name, tokenizer)
    if tokenizer is None:
        where = f"it has no tokenizer at {name!r}, locally or in the cache" if name else "it was not loaded from a named checkpoint"
        raise CalibrationRequired(_advice(f"{where}, so the packaged text cannot be used", "input_ids: (B, T) int64"))
    return _from_text(model, host, name, tokenizer)


def packaged_text(name: Literal["calibration", "evaluation"]) -> str:
    """About 60 kB of public-domain English; the two texts do not overlap. Sources: `assets/text/SOURCES.md`."""
    return files("biassurgery").joinpath(f"assets/text/{name}.txt").read_text(encoding="utf-8")


def packaged_images() -> list[Image]:
    """Three photographs (RGB, 512 x 341) that may be used freely. Sources: `assets/images/SOURCES.md`."""
    from PIL import Image

    found = sorted((f for f in files("biassurgery").joinpath("assets/images").iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name)
    images = []
    for file in found:
        with file.open("rb") as stream:
            images.append(Image.open(stream).convert("RGB"))
    return images


def text_batches(tokenizer: Any, text: str, length: int) -> list[Tensor]:
    """Cut a text into sequences of `length` tokens, each with the special tokens that the tokenizer puts in front: (B, length) int64."""
    prefix = special_prefix(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(prefix)
    rows = [prefix + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    return list(torch.tensor(rows, dtype=torch.int64).split(max(1, _TOKENS // length))) if rows else []


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text by default; not empty means BOS."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next((full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])


def packaged_pixels(model: nn.Module) -> Tensor:
    """The packaged photographs as an image model wants them: three squares of each from left to right, a closer one, and their mirrors.

    Returns:
        (24, 3, H, W) in the dtype of the model's patch embedding.

    Raises:
        CalibrationRequired: the model does not read three channels, or how it wants its images prepared is not known here.
    """
    from PIL import ImageOps

    kernel = patch_kernel(model)
    if kernel is not None and kernel.in_channels != 3:
        raise CalibrationRequired(_advice(f"it reads images of {kernel.in_channels} channels, and the packaged ones have 3",
                                          f"pixel_values: (B, {kernel.in_channels}, H, W), normalised"))
    transform = _own_transform(model)
    crops = []
    for image in packaged_images():
        side, close = image.height, int(image.height * 0.6)
        boxes = [(left, 0, left + side, side) for left in (0, (image.width - side) // 2, image.width - side)]
        left, top = (image.width - close) // 2, (image.height - close) // 2
        crops += [image.crop(box) for box in (*boxes, (left, top, left + close, top + close))]
    pixels = torch.stack([transform(view) for crop in crops for view in (crop, ImageOps.mirror(crop))])
    return pixels if kernel is None else pixels.to(kernel.weight.dtype)


def _own_transform(model: nn.Module) -> Transform:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if not name:
            return image_transform(model)
        folder = _local_folder(name)
        if folder is None:
            raise BadOption(f"model: {name} has no image processor here")
        return image_transform(model, folder)
    except BadOption as error:
        raise CalibrationRequired(_advice("how it wants its images prepared is not known", "pixel_values: (B, 3, H, W), normalised")
                                  ) from error


def _from_published(name: str, tokenizer: Any | None) -> Sites:
    sites = Sites.published(name, None if tokenizer is None else bool(special_prefix(tokenizer)))
    _warn(f"using published ones: {sites.origin.source}. They hold for inputs that begin the same way; pass "
          f"sites=Sites.published({name!r}, bos=...) or sites=calibrate(model, batches) to choose.")
    return sites


def _from_text(model: nn.Module, host: Host, name: str, tokenizer: Any) -> Sites:
    batches = text_batches(tokenizer, packaged_text("calibration"), _length(host.model, tokenizer))
    embedding = getattr(host.model, "get_input_embeddings", None)
    vocabulary: int = host.model.config.vocab_size if embedding is None else embedding().num_embeddings  # type: ignore[assignment, union-attr]
    largest = max((int(batch.max()) for batch in batches), default=0)
    if largest >= vocabulary:
        raise CalibrationRequired(_advice(f"the tokenizer at {name!r} makes token {largest}, but the model has {vocabulary}, so the "
                                          "packaged text cannot be used", "input_ids: (B, T) int64"))
    shape = f"{sum(map(len, batches))} sequences of {batches[0].shape[1]} tokens" if batches else "nothing"
    source = f"packaged public-domain English text, tokenizer of {name} {'with' if special_prefix(tokenizer) else 'without'} BOS, {shape}"
    _warn(f"calibrating on {source}. Pass sites=calibrate(model, batches) with your own data to choose.")
    return calibrate(model, batches, source=source, tower=host.tower)


def _from_images(model: nn.Module, host: Host) -> Sites:
    images = packaged_pixels(host.root)
    size = f"{images.shape[-2]} x {images.shape[-1]}"
    source = f"packaged photographs, {len(images)} crops and flips of 3, {size}, normalised for this model"
    _warn(f"calibrating on {source}. Pass sites=calibrate(model, batches) with your own images to choose.")
    return calibrate(model, list(images.split(_IMAGES)), source=source, tower=host.tower)


def _tokenizer(name: str) -> Any | None:
    """The checkpoint's own tokenizer, or None if it is neither in a local folder nor in the cache."""
    folder = _local_folder(name)
    return None if folder is None else read_tokenizer(folder, local_files_only=True)


def _local_folder(name: str) -> Path | None:
    """The files of a checkpoint on this machine; a hub name would be looked up online by some versions, cached or not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _length(model: nn.Module, tokenizer: Any) -> int:
    """Tokens a sequence: what model and tokenizer take, but no more than `_LENGTH`."""
    config: Any = model.config
    limits = (getattr(config.get_text_config(), name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return min(_LENGTH, tokenizer.model_max_length, *(limit for limit in limits if limit))


def _advice(reason: str, batch: str) -> str:
    return f"""sites: none were given, none are published for this model, and {reason}. Measure them:

    sites = calibrate(model, batches)               # batches: tensors or dicts; {batch}
    patch_model(model, mode, sites=sites)"""


def _warn(message: str) -> None:
    warnings.warn(f"sites: none were given; {message}", UserWarning, stacklevel=_CALLER)
