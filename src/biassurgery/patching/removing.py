"""Taking patches off a model, to the end even where it is interrupted."""

from __future__ import annotations

from torch import nn

from biassurgery.adapters.meshes import reshard
from biassurgery.adapters.registry import find_root
from biassurgery.errors import BadOption
from biassurgery.patching.applied import Patch, is_adapted, is_among, kept_by
from biassurgery.patching.parallel import check_reducer
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import Edit, Place, detach_all, edits_in
from biassurgery.surgery.rescale import RescaleEdit


def remove(model: nn.Module, chosen: list[Patch] | None) -> None:
    """Take the given patches, or all, off a model.

    Once it has begun it goes on to the end, and an interruption is raised after that.
    """
    root = find_root(model)
    edits = [(module, edit) for module, edit in edits_in(root) if edit.patch is not None]
    gone = {id(edit.patch) for _, edit in edits if chosen is None or is_among(edit.patch, chosen)}
    leaving = [Place(None, module, edit) for module, edit in edits if id(edit.patch) in gone]
    staying = [edit for _, edit in edits if id(edit.patch) not in gone]
    _check_positions([place.edit for place in leaving], staying)
    _check_scale(root, [place.edit for place in leaving], staying)
    check_reducer(model, [place.edit for place in leaving])
    thawed = _to_thaw(root, leaving, staying)
    try:
        _take_off(leaving, thawed)
    except BaseException:
        _take_off(leaving, thawed)
        raise


def _take_off(leaving: list[Place], thawed: list[nn.Parameter]) -> None:
    detach_all(leaving)
    for parameter in thawed:
        parameter.requires_grad_(True)


def _to_thaw(root: nn.Module, leaving: list[Place], staying: list[Edit]) -> list[nn.Parameter]:
    """What trains again when some patches leave: what they kept from training and no other does.

    Where PEFT came or went meanwhile, it has frozen these parameters for itself; what the user
    froze meanwhile stays so, too.
    """
    if any(place.edit.patch.frozen for place in leaving):
        reshard(root)
    adapted = is_adapted(root)
    edits = [place.edit for place in leaving if place.edit.patch.adapted == adapted]
    frozen = _frozen_since(root, edits)
    freed = {
        kept.parameter
        for edit in edits
        for kept in edit.patch.frozen
        if kept.parameter is not None and kept.module not in frozen
    }
    return list(freed - kept_by(staying))


def _frozen_since(root: nn.Module, edits: list[Edit]) -> set[nn.Module]:
    """The modules that were frozen as a whole while only the parameters of some edits trained.

    `block.requires_grad_(False)` freezes those edits as well, by which it shows. That a single
    parameter was frozen once more does not show.
    """
    own = {p for edit in edits if edit.patch.frozen for p in edit.parameters()}
    frozen = set[nn.Module]()
    for module in root.modules():
        inside = own.intersection(module.parameters())
        if inside and not any(parameter.requires_grad for parameter in inside):
            frozen.update(module.modules())
    return frozen


def _check_positions(leaving: list[Edit], staying: list[Edit]) -> None:
    """Raise `BadOption` if a token would leave from under a patch whose positions count it."""
    added = [edit.patch.order for edit in leaving if isinstance(edit, BlockEdit) and edit.adds]
    if not added:
        return
    for edit in staying:
        if isinstance(edit, BlockEdit) and edit.positional and edit.patch.order > min(added):
            name = edit.patch.mode.name
            raise BadOption(
                f"mode: {name!r} was applied when a token had been added, and its positions count"
                f" that token; unpatch_model(model, {name!r}) first."
            )


def _check_scale(root: nn.Module, leaving: list[Edit], staying: list[Edit]) -> None:
    """Raise `BadOption` if a patch made for a rescaled stream would stay without it.

    Raises:
        UnsupportedModel: the weights cannot be given back as they lie now.
    """
    scaled = [edit for edit in leaving if isinstance(edit, RescaleEdit)]
    for edit in scaled:
        edit.check(root)
    for edit in staying:
        if scaled and isinstance(edit, BlockEdit):
            name = edit.patch.mode.name
            raise BadOption(
                f"mode: {name!r} was applied to the rescaled model, and what it writes is made for"
                f" that; unpatch_model(model, {name!r}) first."
            )
