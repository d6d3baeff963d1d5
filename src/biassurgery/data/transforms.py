"""How a model wants its photographs prepared, as far as its own library can tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.libraries import is_of, is_transformers
from biassurgery.adapters.wrappers import unwrap
from biassurgery.errors import BadOption, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]


def image_transform(model: nn.Module, folder: Path | None = None) -> Transform:
    """From a photograph (PIL, RGB) to (3, H, W) float32, as the model was evaluated by its makers.

    timm's data config, open_clip's preprocess config, or the image processor in the folder or
    repository that a model of transformers was loaded from, or in `folder`.

    Raises:
        BadOption: none of these is there.
    """
    root: Any = unwrap(model)
    if is_of(root, "timm.models"):
        return _timm(root)
    if getattr(getattr(root, "visual", None), "preprocess_cfg", None):
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = PreprocessCfg(**root.visual.preprocess_cfg)
        return image_transform_v2(config, is_train=False)  # type: ignore[return-value]
    if is_transformers(root) and (folder or root.config._name_or_path):
        return Processed(_processor(str(folder or root.config._name_or_path)))
    raise BadOption(_advice(f"how {type(root).__name__} wants its images prepared is not known"))


def patch_kernel(model: nn.Module) -> nn.Conv2d | None:
    """The first convolution, which cuts a model's images into patches; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


class Processed:
    """An image processor of transformers as a function of one photograph.

    A class, for it must reach other processes.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _timm(model: Any) -> Transform:
    from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]

    config = resolve_data_config({}, model=model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # what the model was built for, where that is not what it was trained at
        config["input_size"] = (config["input_size"][0], *size)
    return create_transform(**config, is_training=False)  # type: ignore[return-value]


def _processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = f"{name} has no image processor ({first_line(error)})"
        raise BadOption(_advice(reason)) from error


def _advice(reason: str) -> str:
    return f"""transform: None, and {reason}. Say it, for example:

    from torchvision import transforms
    transform = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])"""


def image_dtype(model: nn.Module) -> torch.dtype | None:
    """What the patch embedding, the first convolution, reads; None if there is none."""
    kernel = patch_kernel(model)
    return kernel.weight.dtype if kernel is not None and kernel.weight.is_floating_point() else None
