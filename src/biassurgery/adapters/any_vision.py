"""The fallback: vision transformers of transformers that nobody has described, by their structure.

Alone, with a head, or as the tower of a model of images and text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import call, taken
from biassurgery.adapters.fallback import is_text
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.image_tower import PIXELS, Stack, blocks_at, is_dual, stacks_in
from biassurgery.adapters.interface import attention_of, model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.probes import Probes, no_stream, noise
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.stacks import first_of
from biassurgery.adapters.trial import Tokens, tokens_of
from biassurgery.adapters.unknown import ADVICE, why_no_transformer
from biassurgery.errors import SurgeryError, UnsupportedModel
from biassurgery.surgery.attention import Attention

_MLP_OUTS = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense", "ffn.fc2")
_USUAL = 224  # pixels
_HOST_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@register_adapter
class AnyVision(ImageAdapter):
    """Any model of transformers with one list of blocks on what it makes of pixels."""

    family = "any transformers vision model"

    def matches(self, model: nn.Module) -> bool:
        return is_transformers(model) and bool(stacks_in(model))

    def by_name(self, model: nn.Module) -> bool:
        return is_text(model) and not is_dual(model)

    def part(self, model: nn.Module) -> nn.Module:
        return _stack(model).tower

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        reason = why_no_transformer(model)
        if reason is not None:
            raise UnsupportedModel(f"model: {type(model).__name__} {reason}; {ADVICE}.")
        self._tokens(model)
        return blocks_at(model, _stack(model).path)

    def width(self, model: nn.Module) -> int:
        return self._tokens(model).width

    def architecture(self, model: nn.Module) -> str:
        return model_type(model)

    def has_cls(self, model: nn.Module) -> bool:
        return "cls" in self._tokens(model).before

    def registers(self, model: nn.Module) -> int:
        return sum(role.startswith("register") for role in self._tokens(model).before)

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        tokens = self._tokens(model)
        return (*tokens.before, "patch", *dict.fromkeys(tokens.behind))

    def behind(self, model: nn.Module) -> int:
        return len(self._tokens(model).behind)

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        tokens = self._tokens(model)
        patches = shape[1] - len(tokens.before) - len(tokens.behind)
        if self.patch_grid(model, batch, patches) is None:
            raise UnsupportedModel(
                f"model: {type(model).__name__} makes {shape[1]} tokens of images"
                f" {tuple(batch[PIXELS].shape[-2:])}, which are not {len(tokens.before)} in front,"
                f" patches of {tokens.patch[0]} x {tokens.patch[1]} pixels and {len(tokens.behind)}"
                " behind; give images of the size that it was made for."
            )
        roles = self.roles(model)
        row = [*tokens.before, *["patch"] * patches, *tokens.behind]
        codes = torch.tensor([roles.index(role) for role in row], device=batch[PIXELS].device)
        return codes.expand(shape)

    def patch_grid(
        self, model: nn.Module, batch: Mapping[str, Any], patches: int
    ) -> tuple[int, int] | None:
        """As in `ImageAdapter`, where what remains at the edges is left out, or filled up.

        None: images of this size do not come to so many patches.
        """
        grids = self.grids(batch, self._tokens(model).patch)
        return next((grid for grid in grids if grid[0] * grid[1] == patches), None)

    def grids(self, batch: Mapping[str, Any], patch: tuple[int, int]) -> list[tuple[int, int]]:
        """The grids that the images of a batch can be cut into."""
        height, width = batch[PIXELS].shape[-2:]
        down, across = patch
        return [(height // down, width // across), (-(-height // down), -(-width // across))]

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        config: Any = model.config
        if not all(hasattr(config, name) for name in ("num_attention_heads", "hidden_size")):
            return super().attention(model, block)
        return attention_of(model, block, config)

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        return first_of(block, _MLP_OUTS, "the second layer of an MLP")

    def prefix_counters(self, model: nn.Module, block: nn.Module) -> list[str]:
        raise UnsupportedModel(
            f"model: whether the attentions of {type(model).__name__} have a place for one token"
            " more is not known, for no adapter describes it; test_time_registers needs one."
        )

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return taken(model, super().inputs(model, batch))

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        call(model, self.inputs(model, batch))

    def _tokens(self, model: nn.Module) -> Tokens:
        """What a trial run shows; one is enough for a model."""
        kind = type(model).__name__
        try:
            channels, size, patch = _pixels(model)
            probes = Probes(noise(channels, size, next(model.parameters())), patch)
            return tokens_of(model, _stack(model).path, probes, self._on_images)
        except SurgeryError:
            raise
        except _HOST_ERRORS as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise no_stream(kind, f"it fails on images, {said}") from error

    def _on_images(self, model: nn.Module, images: Tensor) -> None:
        self.run(model, self.canonical({PIXELS: images}))


def _stack(model: nn.Module) -> Stack:
    """The one list of blocks of a model, or of a tower of it.

    Raises:
        UnsupportedModel: there are several.
    """
    stacks = stacks_in(model)
    if len(stacks) > 1:
        names = ", ".join(f"{type(stack.tower).__name__}.{stack.path}" for stack in stacks)
        raise UnsupportedModel(
            f"model: {type(model).__name__} has several lists of blocks on the way of its pixels"
            f" ({names}); pass the tower that is meant, or register an ImageAdapter that says which"
            " of them it is."
        )
    return stacks[0]


def _pixels(model: nn.Module) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Channels, height and width of images that a model is made for, and of its patches.

    So its config says, which the trial run finds right or not.
    """
    config: Any = model.config
    convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    first: Any = next(convolutions, None)
    channels = getattr(config, "num_channels", None) or getattr(first, "in_channels", 3)
    size = getattr(config, "image_size", None)
    patch = getattr(config, "patch_size", None) or (first.stride if first is not None else 16)
    tall, wide = _pair(patch)
    height, width = _pair(size) if size else (_USUAL, _USUAL)
    return channels, (max(height // tall, 2) * tall, max(width // wide, 2) * wide), (tall, wide)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, (tuple, list)):
        return int(size[-2]), int(size[-1])
    return int(size), int(size)
