"""Tiny random vision transformers with massive activations planted in their weights.

In every library; see tests/models.py for how.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import (
    CHANNEL,
    DELIMITER,
    KEYS,
    LAYER,
    PATCHES,
    START,
    clear,
    grow,
    images,
)
from tests.vision_builders import (
    hub,
    of_transformers,
    open_clip,
    timm_beit,
    timm_eva,
    timm_vit,
)

# In the names of what makes the first hidden state.
_EMBEDDINGS = ("embed", "cls_token", "reg_token", "register_token", "conv1")


@dataclass(frozen=True)
class Family:
    """One kind of vision transformer; a path that differs by version is a tuple of alternatives.

    Attributes:
        build: makes a random one.
        library: whose version decides what it is.
        blocks: where the block list is.
        attention, projection, reader, writer: the attention, its output projection, and the two
            layers of the MLP, in a block.
        prefix: tokens before the patches.
        registers: how many of them are registers.
        marks: the rows of the embeddings that are given a key, first that of the start token of
            text, then that of its delimiter.
        tokens: the tokens that are so marked, in the same order.
        gain: how much more than other weights those of the attention's output are; it takes more
            behind a first normalisation.
    """

    build: Callable[[], Any]
    library: str
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    projection: tuple[str, ...]
    reader: tuple[str, ...] = ("mlp.fc1",)
    writer: tuple[str, ...] = ("mlp.fc2",)
    prefix: int = 1
    registers: int = 0
    marks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tokens: tuple[int, ...] = ()
    gain: float = 3.0


def _patches(prefix: int) -> tuple[int, ...]:
    return tuple(patch + prefix for patch in PATCHES)


# In transformers 4, then 5.
_INNER = {
    "attention": ("attention.attention", "attention"),
    "projection": ("attention.output.dense", "attention.o_proj"),
}
_TIMM = {
    "library": "timm",
    "blocks": ("blocks",),
    "attention": ("attn",),
    "projection": ("attn.proj",),
}

FAMILIES: dict[str, Family] = {
    "timm_vit": Family(
        timm_vit,
        **_TIMM,
        prefix=3,
        registers=2,
        marks=(("pos_embed", PATCHES),),
        tokens=_patches(3),
    ),
    "timm_eva": Family(
        timm_eva,
        **_TIMM,
        prefix=3,
        registers=2,
        marks=(("pos_embed", PATCHES),),
        tokens=_patches(3),
    ),
    "timm_relative": Family(
        timm_beit, **_TIMM, marks=(("pos_embed", _patches(1)),), tokens=_patches(1)
    ),
    "clip_vision": Family(
        of_transformers("clip"),
        "transformers",
        ("vision_model.encoder.layers",),
        ("self_attn",),
        ("self_attn.out_proj",),
        marks=(("vision_model.embeddings.position_embedding.weight", _patches(1)),),
        tokens=_patches(1),
        gain=12.0,
    ),
    "siglip_vision": Family(
        of_transformers("siglip"),
        "transformers",
        ("vision_model.encoder.layers",),
        ("self_attn",),
        ("self_attn.out_proj",),
        prefix=0,
        marks=(("vision_model.embeddings.position_embedding.weight", PATCHES),),
        tokens=PATCHES,
    ),
    "dinov2": Family(
        of_transformers("dinov2"),
        "transformers",
        ("dinov2.encoder.layer",),
        **_INNER,
        marks=(("dinov2.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
    ),
    "dinov2_with_registers": Family(
        of_transformers("dinov2_with_registers"),
        "transformers",
        ("dinov2_with_registers.encoder.layer",),
        **_INNER,
        prefix=5,
        registers=4,
        marks=(("dinov2_with_registers.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(5),
    ),
    "dinov3_vit": Family(
        of_transformers("dinov3_vit"),
        "transformers",
        ("model.layer", "layer"),
        ("attention",),
        ("attention.o_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
        prefix=5,
        registers=4,
        marks=(("embeddings.cls_token", (0,)), ("embeddings.register_tokens", (1,))),
        tokens=(0, 2),
        gain=6.0,
    ),
    "vit": Family(
        of_transformers("vit"),
        "transformers",
        ("vit.encoder.layer", "vit.layers"),
        **_INNER,
        reader=("intermediate.dense", "mlp.fc1"),
        writer=("output.dense", "mlp.fc2"),
        marks=(("vit.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
    ),
    "vit_mae": Family(
        of_transformers("vit_mae"),
        "transformers",
        ("encoder.layer", "layers"),
        **_INNER,
        reader=("intermediate.dense", "mlp.fc1"),
        writer=("output.dense", "mlp.fc2"),
        marks=(("embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
        gain=6.0,
    ),
    "open_clip_vision": Family(
        open_clip,
        "open_clip_torch",
        ("transformer.resblocks",),
        ("attn",),
        ("attn.out_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
        marks=(("positional_embedding", _patches(1)),),
        tokens=_patches(1),
        gain=12.0,
    ),
    "hub_dinov2": Family(
        hub,
        "torch",
        ("blocks",),
        ("attn",),
        ("attn.proj",),
        prefix=5,
        registers=4,
        marks=(("pos_embed", _patches(1)),),
        tokens=_patches(5),
    ),
}


def first(module: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """The first of several submodules that there is."""
    for path in paths:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"{type(module).__name__} has none of {paths}")


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    """The transformer layers of a planted model, found without the library under test."""
    return list(first(model, FAMILIES[family].blocks).children())


def attentions(model: nn.Module, family: str) -> list[tuple[nn.Module, nn.Module]]:
    """The attention of every layer with its output projection."""
    kind = FAMILIES[family]
    return [
        (first(block, kind.attention), first(block, kind.projection))
        for block in blocks(model, family)
    ]


def planted(family: str) -> Any:
    """A planted vision transformer in eval mode; a new object each time."""
    return copy.deepcopy(_planted(family))


@cache
def _planted(family: str) -> Any:
    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind.build().eval()
    layers = blocks(model, family)
    inside = {id(p) for block in layers for p in block.parameters()}
    named = dict(model.named_parameters())
    writers = [first(block, paths) for block in layers for paths in (kind.projection, kind.writer)]
    sources = [
        _rows(p)
        for name, p in named.items()
        if id(p) not in inside
        and any(part in name for part in _EMBEDDINGS)
        and (p.dim() != 1 or "norm" not in name)
    ]
    with torch.no_grad():
        for p in named.values():
            if p.dim() > 1 and p.std() > 0:
                # So that each part has an effect, and no hidden state is large by itself.
                p.mul_(0.06 / p.std())
        for block in layers:
            projection: Any = first(block, kind.projection)
            projection.weight.mul_(kind.gain)
        for source in sources:
            clear(source, *KEYS.values())
        for writer in writers:
            clear(writer.weight.T, *KEYS.values(), CHANNEL)  # type: ignore[operator, union-attr]
            clear(writer.bias[None], *KEYS.values(), CHANNEL)  # type: ignore[index]
        for (name, rows), key in zip(kind.marks, KEYS):
            _rows(named[name])[list(rows), KEYS[key]] = 4.0
        block = layers[LAYER]
        reader: Any = first(block, kind.reader).weight
        writer: Any = first(block, kind.writer).weight
        weights = ([reader.data], [writer.data])
        tokens = iter(kind.tokens)
        for (_, rows), key, level in zip(kind.marks, KEYS, (START, DELIMITER)):
            marked = torch.tensor([next(tokens) for _ in rows])
            grow(model, block, *weights, images(8), marked, key, level)
    return model


def _rows(parameter: Tensor) -> Tensor:
    """A parameter as (N, D), sharing its memory: what it adds to the channels of hidden states."""
    if parameter.dim() == 4:  # a convolution
        return parameter.data.flatten(1).T
    if parameter.dim() == 1:
        return parameter.data[None]
    return parameter.data.reshape(-1, parameter.shape[-1])
