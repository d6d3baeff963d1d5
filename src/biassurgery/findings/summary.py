"""The four lines that a detection begins with: what there is, where, sinks, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from biassurgery.findings.observations import LayerSummary, RoleSummary, TokenCount
from biassurgery.findings.render import listed, number, ranges
from biassurgery.findings.sinks import Sinks
from biassurgery.findings.site import Site
from biassurgery.findings.sites import Sites
from biassurgery.findings.standing_out import StandingOut, standing_out

_MOST = 3  # of what is named in a line
_WIDTH = 18  # of a token's text


def summary(
    sites: Sites,
    layers: Sequence[LayerSummary],
    roles: Sequence[RoleSummary],
    sinks: Sinks | None,
    no_sinks: str,
) -> tuple[str, str, str, str]:
    """What was found, in four lines.

    Args:
        sites, layers, roles, sinks, no_sinks: see `Detection`.
    """
    hint = standing_out(sites)
    return (
        f"massive: {_what(sites, layers)}",
        f"where: {_where(sites, roles, hint)}",
        f"sinks: {_sinks(sinks, no_sinks)}",
        f"next: {_next(sites, hint)}",
    )


def token_list(tokens: Sequence[TokenCount], most: int) -> str:
    """Tokens as text, with how often: `'<bos>' (8), ' the' (1), and 3 more`."""
    return listed([f"{quoted(token)} ({token.count:,})" for token in tokens], most)


def quoted(token: TokenCount) -> str:
    """A token's text in quotes; a long one is cut."""
    text = token.text if len(token.text) <= _WIDTH else f"{token.text[: _WIDTH - 3]}..."
    return repr(text)


def _what(sites: Sites, layers: Sequence[LayerSummary]) -> str:
    if not len(sites):
        return f"none{sites.definition()}"
    largest = _largest(sites)
    median = next((layer.median for layer in layers if layer.layer == largest.layer), 0.0)
    times = f" ({number(abs(largest.mean) / median)} medians)" if median else ""
    sizes: dict[int, float] = {}
    for site in sites:
        sizes[site.channel] = max(sizes.get(site.channel, 0.0), abs(site.mean))
    blocks = sites.layers()
    channels = [str(channel) for channel in sorted(sizes, key=lambda channel: -sizes[channel])]
    return (
        f"channel{'s' * (len(channels) > 1)} {listed(channels, _MOST)} in"
        f" block{'s' * (len(blocks) > 1)} {ranges(blocks)}, up to {number(largest.mean)}{times}"
    )


def _where(sites: Sites, roles: Sequence[RoleSummary], hint: StandingOut | None) -> str:
    """At the block of the largest: of all blocks, those with many small ones would decide."""
    if not roles:
        return (
            "nowhere"
            if hint is None
            else f"nowhere, but channel {hint.channel} stands out at {hint.role} (block"
            f" {hint.layer}): {number(hint.mean)}, where the median is {number(hint.median)}"
        )
    layer = _largest(sites).layer
    parts = []
    for role in sorted((one for one in roles if one.layer == layer), key=lambda one: -one.share):
        words = f" ({listed(list(map(quoted, role.words)), _MOST)})" if role.words else ""
        parts.append(f"{role.role} {100 * role.share:.1f} %{words}")
    return f"at block {layer}, {'; '.join(parts)}"


def _largest(sites: Sites) -> Site:
    return max(sites, key=lambda site: abs(site.mean))


def _sinks(sinks: Sinks | None, no_sinks: str) -> str:
    if sinks is None:
        return f"not measured; {no_sinks}"
    means = [sum(layer.attention) / len(layer.attention) for layer in sinks.layers]
    least, most = (100 * share for share in (min(means), max(means)))
    tokens = "first tokens" if sinks.layers[0].roles else "start tokens"  # of images, of text
    return (
        f"{tokens} get {least:.1f} to {most:.1f} % of a layer's attention; metric"
        f" {100 * sinks.metric:.1f} %"
    )


def _next(sites: Sites, hint: StandingOut | None) -> str:
    if len(sites):
        return "`biassurgery eval` or bs.compare(...) shows whether the model needs them"
    if hint is None:
        return "nothing to fix; lower min_magnitude and min_ratio find smaller ones"
    magnitude, ratio = hint.definition
    return (
        f"detect and calibrate with min_magnitude={magnitude:g}, min_ratio={ratio:g} take it for"
        " massive"
    )
