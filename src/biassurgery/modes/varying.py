"""What a patch of means says where the start token is no constant: the spread, what it costs."""

from __future__ import annotations

from statistics import median

from biassurgery.errors import warn
from biassurgery.findings.derived import START
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.sites import Sites

CONSTANT = 1e-3  # standard deviation over mean, up to which a value counts as a constant


def warn_of_varying_start(sites: Sites) -> None:
    """Warn where the means of the start token are an approximation, with the spread and a remedy.

    What the start token was is known of sites that were calibrated.
    """
    if len(sites.origin.starts) < 2:
        return
    vary = [s for s in sites if s.role == START and s.std > CONSTANT * abs(s.mean)]
    if not vary:
        return
    largest = max(vary, key=lambda site: abs(site.mean))
    warn(
        "sites: the start token is not a constant: the sequences that were calibrated on began"
        f" with different tokens, and the value of channel {largest.channel} at layer"
        f" {largest.layer} varies with them, {largest.mean:,.6g} +- {largest.std:,.3g}"
        f" ({largest.std / abs(largest.mean):.1%}), so its mean is an approximation, whose cost"
        " perplexity() tells. To have none, put one constant token in front of what the model"
        " reads, by with_start(model, batch, start), and measure behind it, by calibrate(model,"
        " batches, start=...); start is a token such as '<|im_start|>' with tokenizer=, or an id."
    )


def warn_of_varying_key_values(key_values: KeyValues) -> None:
    """Warn where a transplant is an approximation."""
    if key_values.spread <= CONSTANT:
        return
    by_layer = key_values.spread_by_layer
    most = max(range(len(by_layer)), key=by_layer.__getitem__)
    warn(
        "key_values: the start token is not a constant, and its mean stands for it. Its keys or"
        f" values vary by {median(by_layer):.1%} of their size in the layer of the middle and by"
        f" {by_layer[most]:.0%} in layer {most} (key_values.spread_by_layer); where that was"
        " 4% and 173% (SmolLM2-135M), perplexity changed by +1.6% over windows of 128 tokens and by"
        " -0.1% over windows of 256."
        " perplexity() tells what it costs here; calibrate_key_values(model, batches, start=...)"
        " behind a constant token makes it exact."
    )
