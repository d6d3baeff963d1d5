"""The layers that a caller asks for, and the dtype that a block computes in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn

from biassurgery.adapters.parallel import tensor_parallel_mesh
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, LayerOutOfRange
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import Place

Layers = Literal["first", "all"] | int | Sequence[int] | None


def layer_indices(host: Host, layers: int | Sequence[int]) -> list[int]:
    """Layers given by index, ascending.

    Args:
        host: the model.
        layers: one 0-based index or several.

    Raises:
        BadOption, LayerOutOfRange: not indices of this model.
    """
    chosen = integers("layers", layers, "use 'first', 'all' or one or more indices")
    for layer in chosen:
        if not 0 <= layer < len(host.blocks):
            raise LayerOutOfRange(
                f"layers: {layer} is outside the model's blocks 0 to {len(host.blocks) - 1}."
            )
    return sorted(set(chosen))


def all_or_indices(host: Host, layers: Layers, kind: str) -> list[int] | None:
    """The layers of a mode that by default changes all of them, which None stands for.

    Args:
        host: the model.
        layers: what a caller asked for: None, `all`, one 0-based index or several.
        kind: what such modes change, for the message.

    Raises:
        BadOption, LayerOutOfRange: something else, or not indices of this model.
    """
    if layers is None or layers == "all":
        return None
    if isinstance(layers, str):
        raise BadOption(f"layers: {layers!r}; modes on {kind} take 'all' or indices.")
    return layer_indices(host, layers)


def fit_to(host: Host, places: Iterable[Place]) -> None:
    """Tell every edit of a block how the hidden states of this model are laid out.

    Also which ranks have the same.
    """
    mesh = tensor_parallel_mesh(host.root)
    for layer, module, edit in places:
        if isinstance(edit, BlockEdit) and layer is not None and module is host.blocks[layer]:
            edit.width = host.width
            edit.layout = host.layout
            edit.mesh = mesh


def block_dtype(block: nn.Module) -> torch.dtype:
    """The floating dtype that a block computes in; quantised weights do not count."""
    return next(
        (p.dtype for p in block.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1),
        torch.float32,
    )


def integers(argument: str, given: Any, advice: str) -> tuple[int, ...]:
    """One integer, or one or more of them, as a tuple."""
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    if not several or any(not isinstance(i, Integral) or isinstance(i, bool) for i in several):
        raise BadOption(f"{argument}: {given!r}; {advice}.")
    return tuple(map(int, several))
