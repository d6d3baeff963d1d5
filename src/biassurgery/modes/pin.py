"""The mode that writes massive activations where they belong, whatever stands there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from biassurgery.adapters.arguments import parameters_of
from biassurgery.adapters.layers import Layers
from biassurgery.adapters.registry import Host
from biassurgery.edits.pin import PinEdit, PinPrefix, PinStart
from biassurgery.errors import BadOption, NoSites, UnsupportedModel, warn
from biassurgery.findings.sites import Sites
from biassurgery.modes.base import Mode, Place
from biassurgery.modes.choice import chosen_sites
from biassurgery.modes.massive import check_holds
from biassurgery.surgery.edit import edits_in
from biassurgery.surgery.positions import ShiftEdit
from biassurgery.surgery.starts import StartEdit
from biassurgery.surgery.swap import check_swappable

_NO_PLACE = ("elsewhere", "patch")  # roles that are no fixed tokens


@dataclass(frozen=True)
class Pin(Mode):
    """The calibrated mean is written at the tokens of its role, whatever stands there.

    The first real token of each sequence or packed document; [CLS] and registers of images. What
    makes the value may then be clipped, quantised or pruned. Values elsewhere have no fixed place
    and are left out.
    """

    name: ClassVar[str] = "pin"

    def used(self, host: Host, sites: Sites, layers: Layers) -> Sites:
        placed = [site for site in sites if site.role not in _NO_PLACE]
        if len(sites) and not placed:
            roles = " and ".join(sorted({site.role for site in sites}))
            raise NoSites(
                f"sites: all are of the role {roles}, which has no fixed place in a sequence, and"
                " pin writes by place; use set_mean, which finds values by their size."
            )
        chosen = chosen_sites(host, Sites(placed, origin=sites.origin), layers)
        _check_one_level(chosen)
        return chosen

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        chosen = self.used(host, sites, layers)
        _warn_of_left_out(sites)
        _check_has_starts(host)
        by_layer = {layer: _levels(host, chosen.at(layer)) for layer in chosen.layers()}
        places: list[Place] = []
        start = _start_edit(host, sites)
        if start is not None:
            places.append(start)
        for layer, levels in by_layer.items():
            if start is not None:
                assert isinstance(start.edit, StartEdit)
                edit: PinEdit = PinStart(levels[0], start.edit.starts)
            else:
                edit = PinPrefix(levels)
            check_holds(self.name, edit.largest, host, layer)
            places.append(Place(layer, host.blocks[layer], edit))
        return places


def _levels(host: Host, sites: Sites) -> list[dict[int, float]]:
    """What is written for each role of the host, by channel."""
    unknown = sorted({site.role for site in sites} - set(host.roles))
    if unknown:
        raise BadOption(
            f"sites: role {unknown[0]!r}, but the tokens of {type(host.model).__name__} have the"
            f" roles {', '.join(host.roles)}; calibrate on this model."
        )
    return [
        {site.channel: site.mean for site in sites if site.role == role}
        for role in host.roles
        if role not in _NO_PLACE
    ]


def _start_edit(host: Host, sites: Sites) -> Place | None:
    """What tells where sequences of text begin; None: at the first position, as of every image."""
    if host.adapter.modality == "image" or host.adapter.entry == "blocks":
        return None
    makers = host.adapter.position_makers(host.model)
    if makers:
        # A whole model of images and text hands on another mask than it is given.
        module = makers[0 if host.adapter.nested(host.model) else -1]
    else:
        module = host.adapter.body(host.model)
    check_swappable(module, "the model")
    start_id = sites.origin.start_token
    edit = StartEdit(list(parameters_of(module)), host.adapter.ids, start_id)
    return Place(None, module, edit)


def _check_has_starts(host: Host) -> None:
    """Refuse models of which it is not known, in cached decoding, whether a token is the first."""
    if host.adapter.recurrent(host.model):
        raise UnsupportedModel(
            f"mode: 'pin', but {type(host.model).__name__} keeps a recurrent state, which does not"
            " tell how many tokens it has read, so that the first of a sequence is not known in"
            " cached decoding; use set_mean, which needs no places."
        )
    if any(isinstance(edit, ShiftEdit) for _, edit in edits_in(host.root)):
        raise BadOption(
            "mode: 'pin' writes at the start token, which 'transplant' has taken out of the input;"
            " unpatch_model(model, 'transplant') first."
        )


def _check_one_level(sites: Sites) -> None:
    """Refuse roles with several levels: its place does not say which of them is a token's."""
    seen: set[tuple[int, int, str]] = set()
    for site in sites:
        place = (site.layer, site.channel, site.role)
        if place in seen:
            raise BadOption(
                f"sites: role {site.role!r} has several levels in channel {site.channel} of layer"
                f" {site.layer}, and pin writes one; calibrate on sequences that all begin alike,"
                " or keep one: Sites([s for s in sites if s.cluster == 0], origin=sites.origin)."
            )
        seen.add(place)


def _warn_of_left_out(sites: Sites) -> None:
    left_out = sorted({site.role for site in sites if site.role in _NO_PLACE})
    if left_out:
        warn(
            f"sites: those of the role {' and '.join(left_out)} have no fixed place, and pin leaves"
            " them out.",
        )
