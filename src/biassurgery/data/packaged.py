"""The packaged text and photographs, as a model or its tokenizer wants them."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from biassurgery.data.transforms import Transform, image_transform, patch_kernel
from biassurgery.data.windows import tokenize
from biassurgery.errors import BadOption, CalibrationRequired

if TYPE_CHECKING:
    from PIL.Image import Image

LENGTH = 256  # tokens a sequence at most
_TOKENS = 2048  # a batch


def packaged_text(name: Literal["calibration", "evaluation"]) -> str:
    """About 60 kB of public-domain English; the two texts do not overlap.

    Sources: `assets/text/SOURCES.md`.
    """
    return files("biassurgery").joinpath(f"assets/text/{name}.txt").read_text(encoding="utf-8")


def packaged_images() -> list[Image]:
    """Three photographs (RGB, 512 x 341) that may be used freely.

    Sources: `assets/images/SOURCES.md`.
    """
    from PIL import Image

    folder = files("biassurgery").joinpath("assets/images")
    photographs = [file for file in folder.iterdir() if file.name.endswith(".jpg")]
    images = []
    for file in sorted(photographs, key=lambda file: file.name):
        with file.open("rb") as stream:
            images.append(Image.open(stream).convert("RGB"))
    return images


def text_batches(
    tokenizer: Any, text: str, length: int, prefix: list[int] | None = None
) -> list[Tensor]:
    """Cut a text into batches of sequences of `length` tokens: (B, length) int64.

    Each sequence has `prefix` in front; None: the special tokens that the tokenizer puts there.
    """
    prefix = special_prefix(tokenizer) if prefix is None else prefix
    ids = tokenize(tokenizer, text).tolist()
    step = length - len(prefix)
    rows = [prefix + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    if not rows:
        return []
    return list(torch.tensor(rows, dtype=torch.int64).split(max(1, _TOKENS // length)))


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text by default.

    Not empty means BOS.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next((full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])


def packaged_pixels(model: nn.Module) -> Tensor:
    """The packaged photographs as an image model wants them.

    Three squares of each from left to right, a closer one, and their mirrors.

    Returns:
        (24, 3, H, W) in the dtype of the model's patch embedding.

    Raises:
        CalibrationRequired: the model does not read three channels, or how it wants its images
            prepared is not known here.
    """
    from PIL import ImageOps

    kernel = patch_kernel(model)
    if kernel is not None and kernel.in_channels != 3:
        raise CalibrationRequired(
            calibration_advice(
                f"it reads images of {kernel.in_channels} channels, and the packaged ones have 3",
                f"pixel_values: (B, {kernel.in_channels}, H, W), normalised",
            )
        )
    transform = _own_transform(model)
    crops = []
    for image in packaged_images():
        side = image.height
        close = int(image.height * 0.6)
        boxes = [
            (left, 0, left + side, side)
            for left in (0, (image.width - side) // 2, image.width - side)
        ]
        left = (image.width - close) // 2
        top = (image.height - close) // 2
        crops += [image.crop(box) for box in (*boxes, (left, top, left + close, top + close))]
    pixels = torch.stack(
        [transform(view) for crop in crops for view in (crop, ImageOps.mirror(crop))]
    )
    return pixels if kernel is None else pixels.to(kernel.weight.dtype)


def _own_transform(model: nn.Module) -> Transform:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if not name:
            return image_transform(model)
        folder = local_folder(name)
        if folder is None:
            raise BadOption(f"model: {name} has no image processor here")
        return image_transform(model, folder)
    except BadOption as error:
        raise CalibrationRequired(
            calibration_advice(
                "how it wants its images prepared is not known",
                "pixel_values: (B, 3, H, W), normalised",
            )
        ) from error


def local_folder(name: str) -> Path | None:
    """The files of a checkpoint on this machine, or its one file; None: there are none.

    A hub name would be looked up online by some versions, cached or not.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # False, where Path.exists() raises: the name may be of any length
    if os.path.isdir(name) or (name.endswith(".gguf") and os.path.isfile(name)):
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def calibration_advice(reason: str, batch: str) -> str:
    return f"""sites: none were given, none are published for this model, and {reason}.
Measure them:

    sites = calibrate(model, batches)               # batches: tensors or dicts; {batch}
    patch_model(model, mode, sites=sites)"""
