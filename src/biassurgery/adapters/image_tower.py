"""Where in a model images become tokens: the innermost module that reads pixels and has blocks."""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

from torch import nn

from biassurgery.adapters.unknown import attends
from biassurgery.adapters.wrappers import unwrap
from biassurgery.surgery.swap import host_class

PIXELS = "pixel_values"


class Stack(NamedTuple):
    """A list of blocks that attend, and what reads the pixels for it.

    Attributes:
        path: of the list, from `tower`.
        tower: the innermost module around it whose forward takes pixels, and no token ids.
    """

    path: str
    tower: nn.Module


def stacks_in(model: nn.Module) -> list[Stack]:
    """The outermost lists of blocks that attend, on the paths of pixels alone, in order.

    What reads token ids as well (`input_ids`) is the model around its towers.
    """
    readers = {name: module for name, module in model.named_modules() if _reads_pixels(module)}
    if not readers:
        return []
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        around = [reader for reader in readers if reader == "" or name.startswith(f"{reader}.")]
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if around and not nested and _is_stack(module):
            inner = max(around, key=len)
            path = name.removeprefix(f"{inner}." if inner else "")
            found[name] = Stack(path, readers[inner])
    return list(found.values())


def is_dual(model: nn.Module) -> bool:
    """Whether a model embeds images and texts in one space, as CLIP: towers of equal rank."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def blocks_at(tower: nn.Module, path: str) -> list[nn.Module]:
    """The blocks in a list, without what stands around them."""
    return [unwrap(block) for block in tower.get_submodule(path).children()]


def _reads_pixels(module: nn.Module) -> bool:
    return _takes_pixels(host_class(module))


@cache
def _takes_pixels(kind: type[nn.Module]) -> bool:
    names = inspect.signature(kind.forward).parameters
    return PIXELS in names and not any("input_ids" in name for name in names)


def _is_stack(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any(map(attends, block.modules())) for block in module)
    )
