"""What the battery runs over: every planted family with every activation mode.

A new text architecture is one line: its name in `FAMILIES` of tests/models.py. A new image model is one line in `IMAGE_FAMILIES`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from tests import models

IMAGE_FAMILIES: dict[str, tuple[Callable[..., Any], str]] = {"timm_vit": (models.planted_vit, "timm")}

LENGTH, DELIMITER_AT = 12, 5
VALUE = -1234.5
CHANNELS, POSITIONS = (3, models.CHANNEL), (0, 4)  # what the explicit writes of `set_value` go to

# Each variant of a mode: its name in the support matrix, the mode, its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "set_mean": ("set_mean", {}),
    "set_zero": ("set_zero", {}),
    "set_value": ("set_value", {"value": VALUE}),
    "set_value at positions": ("set_value", {"value": VALUE, "channels": CHANNELS, "positions": POSITIONS}),
    "noise": ("noise", {}),
    "shuffle": ("shuffle", {}),
    "zero_random": ("zero_random", {}),
}


@dataclass(frozen=True)
class Case:
    """One family with one variant of a mode."""

    family: str
    variant: str

    def __str__(self) -> str:
        return f"{self.family}-{self.variant.replace(' ', '_')}"

    @property
    def modality(self) -> str:
        return "image" if self.family in IMAGE_FAMILIES else "text"

    @property
    def library(self) -> str:
        """Whose version decides what the model is."""
        return "timm" if self.modality == "image" else "transformers"

    @property
    def mode(self) -> str:
        return VARIANTS[self.variant][0]

    @property
    def positional(self) -> bool:
        """Whether the patch writes at positions, padding included, instead of at massive values."""
        return "positions" in VARIANTS[self.variant][1]

    @property
    def row_by_row(self) -> bool:
        """Whether what happens to a sequence is the same alone, in any company and at any offset."""
        return self.mode != "shuffle" and not self.positional

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new planted model in eval mode."""
        return copy.deepcopy(_image_model(self.family)).to(dtype) if self.modality == "image" else models.planted(self.family, dtype)

    def block(self, model: nn.Module) -> nn.Module:
        """The block that is patched, found without the library."""
        return models.blocks(model, IMAGE_FAMILIES[self.family][1] if self.modality == "image" else self.family)[models.LAYER]

    def batch(self, rows: int = 2, seed: int = 1) -> Tensor:
        """What the model takes as its only argument: token ids (rows, LENGTH), or images."""
        if self.modality == "image":
            return models.images(rows, seed)
        return models.tokens(rows, LENGTH, seed, DELIMITER_AT)

    def massive(self, batch: Tensor) -> Tensor:
        """(B, T) bool: the tokens that were planted to carry a massive activation."""
        if self.modality == "text":
            return (batch == models.START_ID) | (batch == models.DELIMITER_ID)
        tokens = (models.IMAGE // models.PATCH) ** 2 + 1
        return torch.zeros(len(batch), tokens, dtype=torch.bool).index_fill(1, torch.tensor(models.PATCHES) + 1, True)

    def sites(self, std: float = 0.01) -> bs.Sites:
        """The calibrated sites of the family with a standard deviation of our choice, which only `noise` reads."""
        sites = _calibrated(self.family)
        return bs.Sites([replace(site, std=std) for site in sites], origin=sites.origin)

    def patch(self, model: Any, sites: bs.Sites | None = None, layers: Any = models.LAYER, **options: Any) -> Any:
        """Apply the mode; `options` over the variant's own."""
        return bs.patch_model(model, self.mode, sites=sites or self.sites(), layers=layers, **(VARIANTS[self.variant][1] | options))

    def patched(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new patched model."""
        return self.patch(self.model(dtype))

    def save_weights(self, model: Any, folder: Path) -> None:
        """Write a checkpoint in the way of the model's own library."""
        model.save_pretrained(folder) if self.modality == "text" else torch.save(model.state_dict(), folder / "weights.pt")

    def load_weights(self, folder: Path) -> Any:
        """A model in eval mode that was never patched, with the weights of a checkpoint."""
        if self.modality == "text":
            return type(self.model()).from_pretrained(folder).eval()
        model = type(self.model())(img_size=models.IMAGE, patch_size=models.PATCH, embed_dim=models.HIDDEN, depth=models.LAYERS,
                                   num_heads=models.HEADS, num_classes=5).eval()
        model.load_state_dict(torch.load(folder / "weights.pt"))
        return model


@cache
def _image_model(family: str) -> Any:
    return IMAGE_FAMILIES[family][0]()


@cache
def _calibrated(family: str) -> bs.Sites:
    case = Case(family, "set_mean")
    sites = bs.calibrate(case.model(), case.batch(4, seed=7))
    assert sites.layers() == list(range(models.LAYER, models.LAYERS))
    assert {site.channel for site in sites} == {models.CHANNEL}
    return sites


CASES = [Case(family, variant) for family in (*models.FAMILIES, *IMAGE_FAMILIES) for variant in VARIANTS]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
# An image has no cache, no padding and no documents: these checks are a property of text, not something image models lack.
text_cases = pytest.mark.parametrize("case", [case for case in CASES if case.modality == "text"], ids=str)


def accepts(model: Any, name: str) -> bool:
    """Whether a model's forward takes an argument by this name."""
    return name in inspect.signature(model.forward).parameters


def logits_of(output: Any) -> Tensor:
    """What a model predicts."""
    return output if isinstance(output, Tensor) else output.logits


def hidden_of(output: Any) -> Tensor:
    """The hidden state that a block returned."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Seen:
    """One run: the output (B, T, D) of the patched block, and the logits."""

    hidden: Tensor
    logits: Tensor


def see(case: Case, model: Any, batch: Tensor, **arguments: Any) -> Seen:
    """Run a model without gradients, with the same random numbers each time."""
    hidden: list[Tensor] = []
    handle = case.block(model).register_forward_hook(lambda _, __, output: hidden.append(hidden_of(output).clone()))
    torch.manual_seed(123)
    try:
        with torch.no_grad():
            logits = logits_of(model(batch, **arguments))
    finally:
        handle.remove()
    return Seen(torch.cat(hidden, 1), logits)


def substitute(case: Case, model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Let an unpatched model go on with `change(hidden)` after the block: what a patch must amount to, by a plain forward hook."""
    def replaced(_module: Any, _inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    case.block(model).register_forward_hook(replaced)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to a fraction of the largest magnitude: two orders of computing the same float32 numbers differ by up to 3e-5."""
    assert found.shape == wanted.shape
    assert distance(found, wanted) <= tolerance


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((a - b).abs().max() / b.abs().max()).item()
