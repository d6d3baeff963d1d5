"""Outlier tokens of a vision transformer: patches whose norm at a block's output is large.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation, UnsupportedModel
from biassurgery.measure.observe import check_ran, observed

# largest patch norm of an image over the median one, from which on a model has outlier tokens
PROMINENT = 4.0
SAMPLE = 32  # images by which the layer and the threshold are chosen


class Norms(NamedTuple):
    """Norms (L, B, T) float32 at every block's output, and which tokens are patches (B, T).

    Both are on the CPU.
    """

    values: Tensor
    patches: Tensor


def norms_of(host: Host, batch: dict[str, Any]) -> Norms:
    """Run one batch of images and take the norms of its tokens."""
    norms: dict[int, Tensor] = {}
    with observed(host, lambda layer, hidden: norms.update({layer: hidden.float().norm(dim=-1)})):
        host.adapter.run(host.model, batch)
    check_ran(host, norms)
    values = torch.stack([norms[layer].cpu() for layer in range(len(host.blocks))])
    if not values.isfinite().all():
        raise NonFiniteActivation(
            f"images: a block's output holds NaN or infinity; {what_to_do(host)}."
        )
    rows, tokens = values.shape[1:]
    roles = host.adapter.token_roles(host.model, batch, (rows, tokens)).cpu()
    return Norms(values, roles == host.roles.index("patch"))


def sample_of(host: Host, batches: Iterator[dict[str, Any]]) -> list[tuple[dict[str, Any], Norms]]:
    """The first batches, of `SAMPLE` images or more together, with their norms."""
    sample: list[tuple[dict[str, Any], Norms]] = []
    for batch in batches:
        sample.append((batch, norms_of(host, batch)))
        if sum(len(norms.patches) for _, norms in sample) >= SAMPLE:
            break
    return sample


def choose_layer(
    sample: list[Norms], layer: int | None, threshold: float | None
) -> tuple[int, float]:
    """The layer where outlier tokens appear, and the norm beyond which a patch is one."""
    median = torch.cat([norms.values[:, norms.patches] for norms in sample], 1).median(1).values
    largest = torch.cat(
        [norms.values.masked_fill(~norms.patches, 0).amax(2) for norms in sample], 1
    ).mean(1)
    ratio = largest / median.clamp(min=torch.finfo(median.dtype).tiny)
    if layer is None:
        growth = ratio / torch.cat([torch.ones(1), ratio[:-1]])
        layer = int(growth.masked_fill(ratio < PROMINENT, 0).argmax())
        if ratio.amax() < PROMINENT:
            raise UnsupportedModel(
                "model: it has no outlier tokens: the largest patch norm of an image is"
                f" {ratio.amax():.2g} times the median one at block {int(ratio.argmax())}, and less"
                f" at all others; {PROMINENT:g} times are asked for. To decide otherwise give"
                " layer= and threshold=."
            )
    if threshold is None:
        if ratio[layer] < PROMINENT:
            raise UnsupportedModel(
                f"model: it has no outlier tokens at block {layer}, where the largest patch norm of"
                f" an image is {ratio[layer]:.2g} times the median one, {largest[layer]:.3g};"
                f" {PROMINENT:g} times are asked for. Give another layer=, or threshold=."
            )
        threshold = math.sqrt(median[layer].item() * largest[layer].item())
    return layer, threshold
