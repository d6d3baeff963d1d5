"""A tiny random model of every structure among timm's transformers with one stack of blocks, by
shrinking an architecture's sizes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

# 6 x 6 patches: encoders merge 2 x 2 or 3 x 3 of them
DEPTH = 2
HEADS = 4
WIDTH = 32
IMAGE = 48
PATCH = 8
STEM_IMAGE = 64  # what a convolutional stem makes at least 2 x 2 patches of

# All that an architecture is apart from these is its structure. What counts is whether init_values
# is given, not how small it is.
SIZES = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
}
GIVEN = {
    "mlp_ratio": 2.0,
    "head_dim": WIDTH // HEADS,
    "intermediate_size": 2 * WIDTH,
    "init_values": 1.0,
    "rel_pos_dim": WIDTH,
    "ref_feat_shape": (IMAGE // PATCH,) * 2,
    "attn_pool_num_heads": HEADS,
    "attn_pool_mlp_ratio": 2.0,
}
ELSEWHERE = (
    "feature_cfg",
    "kwargs_filter",
    "num_classes",
    "out_features",
    "pos_embed_grid_size",
    "pretrained",
)  # what no block sees

SERVED = (
    "Beit",
    "DeepseekVitClassifier",
    "DeepseekVitEncoder",
    "Eva",
    "Gemma4VitClassifier",
    "Gemma4VitEncoder",
    "NaFlexVit",
    "Qwen3VitClassifier",
    "Qwen3VitEncoder",
    "VisionTransformer",
    "VisionTransformerDistilled",
    "VisionTransformerRelPos",
)
REFUSED = (
    "Cait",
    "ConVit",
    "CrossVit",
    "Hiera",
    "HieraDet",
    "TNT",
    "VOLO",
    "VisionTransformerSAM",
    "Xcit",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What several architectures have in common.

    Attributes:
        text: the class and the arguments that make it, sizes aside.
        sizes: the arguments that shrink the first of its architectures.
        names: the architectures.
    """

    text: str
    sizes: dict[str, Any]
    names: tuple[str, ...]

    def model(self) -> Any:
        """A tiny random model in evaluation mode, whose blocks all matter."""
        torch.manual_seed(0)
        model = timm.create_model(self.names[0], pretrained=False, **self.sizes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        return model

    def images(self, rows: int) -> Tensor:
        """(rows, 3, H, W), always the same."""
        return torch.randn(
            rows,
            3,
            self.sizes["img_size"],
            self.sizes["img_size"],
            generator=torch.Generator().manual_seed(1),
        )


class _Found(Exception):
    """Stops the making of a model."""


@cache
def classes() -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    """The class and the constructor's arguments of every architecture of timm; no model is made."""
    return {name: _arguments(name) for name in timm.list_models()}


def _arguments(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
    def build(
        model: type[nn.Module],
        variant: str,
        pretrained: bool,
        model_cfg: Any = None,
        **arguments: Any,
    ) -> None:
        raise _Found(model, arguments)

    with mock.patch.object(
        sys.modules[model_entrypoint(name).__module__], "build_model_with_cfg", build
    ):  # all models pass there
        try:
            with torch.device("meta"):  # stems are made before
                timm.create_model(name)
        except _Found as found:
            return found.args  # type: ignore[return-value]
    raise AssertionError(f"{name} is made in another way")


@cache
def structures() -> tuple[Structure, ...]:
    """What the architectures of the `SERVED` classes are, each structure once."""
    names: dict[str, list[str]] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for name, (kind, arguments) in classes().items():
        if kind.__name__ in SERVED:
            given = dict(_flat({**_own_scale(kind), **arguments}))
            text = f"{kind.__name__}({', '.join(_described(given))})"
            names.setdefault(text, []).append(name)
            sizes.setdefault(text, _sizes(given))
    return tuple(Structure(text, sizes[text], tuple(names[text])) for text in sorted(names))


def _own_scale(kind: type[nn.Module]) -> dict[str, Any]:
    """The scale of what blocks add to the stream, where a class has one by default: relative
    positions do.
    """
    scale = inspect.signature(kind).parameters.get("init_values")
    return {} if scale is None else {"init_values": scale.default}


def _flat(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments that are given; of a config those that are not its default."""
    for name, value in arguments.items():
        if name == "cfg":
            changed = {
                field.name: getattr(value, field.name)
                for field in dataclasses.fields(value)
                if getattr(value, field.name) != field.default
            }
            yield from _flat(changed)
        elif value is not None and not name.startswith(ELSEWHERE):
            yield name, value


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    """What makes an architecture tiny; a stem keeps its sizes, and the blocks theirs where its
    channels are the residual stream's.
    """
    small = {name: value for name, value in GIVEN.items() if name in given}
    if "embed_layer" in given:  # a convolutional stem
        projected = given["embed_layer"].keywords.get("proj", True)
        small |= {"embed_dim": WIDTH, "num_heads": HEADS} if projected else {}
        return {**small, "img_size": STEM_IMAGE, "depth": DEPTH}
    if isinstance(given.get("num_kv_heads"), tuple):  # one number a block, smaller in the middle
        own = given["num_kv_heads"]
        small["num_kv_heads"] = tuple(
            HEADS * kv // given["num_heads"] for kv in (own[0], own[len(own) // 2])
        )
    return {**SIZES, **small}


def _described(given: dict[str, Any]) -> Iterator[str]:
    """Each argument that is no size, as text."""
    small = _sizes(given)
    for name, value in sorted(given.items()):
        if name in ("init_values", "num_kv_heads"):
            yield f"{name}={small[name]}"
        elif name not in SIZES and name not in GIVEN:
            yield f"{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, partial):
        keywords = ", ".join(f"{name}={_text(each)}" for name, each in value.keywords.items())
        return f"{_text(value.func)}({keywords})"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", repr(value))
