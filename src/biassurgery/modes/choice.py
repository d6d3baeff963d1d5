"""Which sites a patch on activations changes."""

from __future__ import annotations

from biassurgery.adapters.layers import Layers, layer_indices
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, LayerOutOfRange, NoSites
from biassurgery.findings.births import first_places
from biassurgery.findings.sites import Sites


def chosen_sites(host: Host, sites: Sites, layers: Layers) -> Sites:
    """The sites at the layers that a caller asks for.

    Args:
        host: the model.
        sites: of it.
        layers: `first` or None: each channel where its massive values are born, and where they have
            grown since; `all`; or indices, each with at least one site.

    Raises:
        NoSites, BadOption, LayerOutOfRange: there are none, or not such ones.
    """
    if not len(sites):
        raise NoSites(
            f"sites: there is nothing to change, for the sites are empty{_from(sites)}. The"
            " model may have no massive activations by this definition; detect(model, batches)"
            " shows its largest values, and calibrate() takes min_magnitude= and min_ratio=."
        )
    _check_range(host, sites)
    if layers is None or (isinstance(layers, str) and layers == "first"):
        places = first_places(sites)
        chosen = (site for site in sites if (site.layer, site.channel) in places)
        return Sites(chosen, origin=sites.origin)
    if isinstance(layers, str):
        if layers == "all":
            return sites
        raise BadOption(f"layers: {layers!r}; use 'first', 'all' or indices.")
    indices = layer_indices(host, layers)
    without = [layer for layer in indices if layer not in sites.layers()]
    if without:
        raise LayerOutOfRange(
            f"layers: {without} have no sites; sites are at layers {sites.layers()}."
        )
    return Sites((site for site in sites if site.layer in indices), origin=sites.origin)


def _from(sites: Sites) -> str:
    return f" (from {sites.origin.source})" if sites.origin.source else ""


def _check_range(host: Host, sites: Sites) -> None:
    for site in sites:
        if not 0 <= site.layer < len(host.blocks):
            raise LayerOutOfRange(
                f"sites: layer {site.layer} is outside the {len(host.blocks)} blocks of this model;"
                " calibrate on it."
            )
        if not 0 <= site.channel < host.width:
            raise BadOption(
                f"sites: channel {site.channel} is outside the {host.width} channels of this model;"
                " calibrate on it."
            )
        if site.gate is None and not site.mean:
            raise BadOption(
                f"sites: {site} has a mean of 0 and no gate, so that every value would be massive;"
                " give it a gate=."
            )
        if site.gate is not None and site.gate < 0:
            raise BadOption(
                f"sites: {site} has a gate that no magnitude can be compared with; calibrate again,"
                " or give gate=None."
            )
