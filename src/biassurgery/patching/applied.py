"""What is applied to a model: its patches, read off the edits on its modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from biassurgery.adapters.registry import Tower, find_host, find_root
from biassurgery.errors import Incompatible
from biassurgery.findings.sites import Sites
from biassurgery.modes import Mode
from biassurgery.surgery.edit import Edit, edits_in


class Kept(NamedTuple):
    """A parameter of the model that a patch keeps from training, by where it is.

    Not by the object: `load_state_dict(assign=True)` and FSDP2 put another in its place.
    """

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is there now; None: it has gone."""
        return self.module._parameters.get(self.name)


@dataclass(frozen=True)
class Patch:
    """One applied patch.

    Attributes:
        mode: what it does.
        layers: the blocks it changed, ascending.
        sites: what it was made from, for those layers.
        order: patches of a smaller one were there before.
        frozen: the parameters of the model that this patch keeps from training.
        adapted: whether PEFT had adapted the model before.
        tower: which tower of the model it is on; None: the model has one only.
    """

    mode: Mode
    layers: tuple[int, ...]
    sites: Sites
    tower: Tower | None = None
    order: int = field(default=0, compare=False)
    frozen: tuple[Kept, ...] = field(default=(), compare=False, repr=False)
    adapted: bool = field(default=False, compare=False, repr=False)


def patches(model: nn.Module) -> tuple[Patch, ...]:
    """What is applied to a model, in order of application.

    Read off the blocks themselves, so a copy has its own.

    Args:
        model: of a supported architecture, also wrapped.

    Raises:
        UnsupportedModel: no adapter knows it.
    """
    edits = edits_in(find_root(model))
    applied = {id(edit.patch): edit.patch for _, edit in edits if edit.patch is not None}
    return tuple(sorted(applied.values(), key=lambda patch: patch.order))


def edits_by_layer(model: nn.Module, patch: Patch) -> dict[int, Edit]:
    """The edits of one patch of a model, except those of the model as a whole."""
    host = find_host(model, patch.tower)
    layers = {
        id(module): layer for layer, block in enumerate(host.blocks) for module in block.modules()
    }
    return {
        layers[id(module)]: edit
        for module, edit in edits_in(host.root)
        if edit.patch is patch and id(module) in layers
    }


def check_in_place(model: nn.Module, patch: Patch) -> None:
    """Raise `Incompatible` where blocks have come, gone or moved since a patch was applied.

    It does what it did, on the blocks that it was put on; but where it is can no longer be said.
    """
    edits = edits_by_layer(model, patch)
    moved = [layer for layer, edit in edits.items() if edit.at_layer not in (None, layer)]
    if moved or sorted(edits) != list(patch.layers):
        raise Incompatible(
            f"model: {patch.mode.name} was applied to the blocks {list(patch.layers)}, and blocks"
            f" have come, gone or moved since: it is on {sorted(edits)} now, so a file could not"
            " say where it belongs; unpatch_model(model), and patch the model as it is."
        )


def kept_by(edits: Iterable[Edit]) -> set[nn.Parameter]:
    """What the patches of some edits keep from training."""
    # Sets of parameters are right: they hash by identity, so `in` never compares values.
    patches = [edit.patch for edit in edits if edit.patch is not None]
    kept = {kept.parameter for patch in patches for kept in patch.frozen}
    return {parameter for parameter in kept if parameter is not None}


def is_among(patch: Patch, patches: Sequence[Patch]) -> bool:
    """Whether a patch is one of these very objects: equal ones are on other towers."""
    return any(patch is other for other in patches)


def is_adapted(root: nn.Module) -> bool:
    """Whether there are PEFT's adapters in the model."""
    return any(type(module).__module__.startswith("peft.") for module in root.modules())
