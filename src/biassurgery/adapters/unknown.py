"""What to say of a model that no adapter knows: how it can be described, or why it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from biassurgery.adapters.arguments import parameters_of
from biassurgery.adapters.libraries import is_of, is_transformers

ADVICE = "pass a plain vision transformer, of one width from its first block to its last"
_TEXT = ("TextAdapter", "the transformer layers, in order", "")
_IMAGE = (
    "ImageAdapter",
    "the transformer layers, in order, each (B, T, D)",
    """
        def has_cls(self, model): return True                   # is the first token [CLS]?
        def registers(self, model): return 0                    # learned tokens behind it""",
)


def unknown(model: nn.Module, families: Sequence[str]) -> str:
    """The message that no adapter knows a model."""
    kind = type(model).__name__
    reads = getattr(model, "main_input_name", None) if is_transformers(model) else None
    if reads not in (None, "input_ids", "pixel_values") and not _packs(model):
        return (
            f"model: {kind} reads {reads}; this library measures models that read token ids or"
            " pixels and, of sound, the encoder of Whisper (model.get_encoder())."
        )
    images = reads == "pixel_values" or _packs(model) or _is_image_model(model)
    reason = why_no_transformer(model) if images else None
    if reason is not None:
        return f"model: {kind} {reason}; {ADVICE}."
    return _how_to_register(kind, families, _IMAGE if images else _TEXT)


def image_tower(model: Any) -> str | None:
    """Why the image tower of a model is not served, where that is another network; None: it is."""
    tower = getattr(model, "visual", None)
    if not isinstance(tower, nn.Module):
        packing = (module for module in model.modules() if _packs(module))
        tower = next(packing, None)
    if tower is None:
        sees = getattr(getattr(model, "config", None), "vision_config", None) is not None
        reads = "it has no list of blocks that attend, between pixel_values (B, C, H, W) and text"
        return reads if sees else None
    tower = getattr(tower, "trunk", tower)
    reason = why_no_transformer(tower)
    return None if reason is None else f"its image tower, {type(tower).__name__}, {reason}"


def why_no_transformer(model: nn.Module) -> str | None:
    """Why an image model has no one residual stream of tokens; None: it may have."""
    if _packs(model):
        return (
            "reads the patches of all images strung together (T, D), with a grid for each: there is"
            " no residual stream (B, T, D) with a row an image, so it cannot be served"
        )
    frames = getattr(getattr(model, "config", None), "num_frames", None)
    if frames is not None and getattr(model, "main_input_name", None) == "pixel_values":
        return "reads videos, several frames a row, where this library reads images"
    if not any(attends(module) for module in model.modules()):
        return (
            "has no attention: convolutional networks and mixers have no tokens that carry massive"
            " activations, sinks or registers, and cannot be served"
        )
    if not _has_stages(model):
        return None
    within = " and attends within windows" if any(map(_has_windows, model.modules())) else ""
    return (
        f"has blocks of several widths or resolutions (stages, branches){within}: there is no one"
        " residual stream (B, T, D), so it cannot be served"
    )


def _is_image_model(model: nn.Module) -> bool:
    return any(is_of(model, library) for library in ("timm.models", "torchvision.models")) or (
        # A patch embedding: the first convolution reads the three colours.
        next((m.in_channels == 3 for m in model.modules() if isinstance(m, nn.Conv2d)), False)
    )


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention over tokens: it has heads, and does not pool."""
    names = ("num_heads", "num_attention_heads", "n_heads", "heads")
    return any(hasattr(module, name) for name in names) and "Pool" not in type(module).__name__


def _packs(module: nn.Module) -> bool:
    """Whether a model reads packed patches and their grids, as those of Qwen2-VL do."""
    names = () if not is_transformers(module) else parameters_of(module)
    return any("grid_thw" in name for name in names) and not hasattr(module, "get_image_features")


def _has_windows(module: nn.Module) -> bool:
    """Whether a module attends to a window of an image (Swin, MaxViT)."""
    name = type(module).__name__
    return attends(module) and (
        hasattr(module, "window_size") or "Window" in name or "Swin" in name
    )


def _has_stages(model: Any) -> bool:
    """Whether a model of timm or transformers says that its width or resolution changes."""
    config = getattr(model, "config", None)
    stages: list[Any] = [getattr(config, name, None) for name in ("hidden_sizes", "depths")]
    levels = getattr(model, "feature_info", None)
    if isinstance(levels, list):
        stages.append({(level["num_chs"], level["reduction"]) for level in levels})
    return any(stage is not None and len(stage) > 1 for stage in stages)


def _how_to_register(kind: str, families: Sequence[str], adapter: tuple[str, str, str]) -> str:
    base, blocks, further = adapter
    return f"""model: no adapter knows {kind}. Known families: {", ".join(families)}.
Describe it in a few lines and try again:

    from biassurgery.extend import {base}, register_adapter

    @register_adapter
    class My{kind}({base}):
        family = "{kind.lower()}"
        def matches(self, model): return type(model).__name__ == "{kind}"
        def blocks(self, model): return list(model.layers)      # {blocks}
        def width(self, model): return model.hidden_size        # channels of the residual stream\
{further}"""
