"""Register neurons: the few MLP neurons that make the outlier tokens of a vision transformer.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", section 3.2,
    algorithm 1, appendix A.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import ImageAdapter
from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import (
    AlreadyPatched,
    BadOption,
    LayerOutOfRange,
    NonFiniteActivation,
    UnsupportedModel,
)
from biassurgery.findings.register_neurons import RegisterNeuron, RegisterNeurons
from biassurgery.measure.observe import observed
from biassurgery.measure.reading import reading, with_bar
from biassurgery.surgery.block import added_tokens

# largest patch norm of an image over the median one, from which on a model has outlier tokens
PROMINENT = 4.0
SAMPLE = 32  # images by which the layer and the threshold are chosen


def find_register_neurons(
    model: nn.Module,
    images: Batch | Iterable[Batch],
    *,
    count: int = 10,
    layer: int | None = None,
    threshold: float | None = None,
    progress: bool | None = None,
) -> RegisterNeurons:
    """Find the neurons that make the outlier tokens of a vision transformer, for
    `patch_model(model, "test_time_registers", neurons=...)`.

    Outlier tokens are the patches whose norm at the output of a block is beyond a threshold. Of
    every neuron in the MLPs up to that block the mean magnitude at them is taken, over the outlier
    tokens of an image and then over images; the largest are the register neurons. The images are
    read once, in evaluation mode and without gradients; each batch with outlier tokens is run
    twice, so that no activations need to be kept. Memory does not grow with the number of images.

    Args:
        model: a vision transformer without test-time registers.
        images: tensors `pixel_values` (B, C, H, W), dicts of the model's arguments, or pairs with
            labels; some tens of images will do.
        count: how many neurons; Jiang et al. take 10 for ViT-B and raise it until no outlier tokens
            are left in the image.
        layer: the block where outlier tokens first appear. None: where the largest patch norm of an
            image, as a multiple of the median norm, grows most from one block to the next.
        threshold: of the norm. None: sqrt(median norm x mean over images of the largest norm), so
            that it is as many times above the one as it is below the other. What is None is chosen
            by the first batches, of 32 images or more together.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        UnsupportedModel: a text model, or one without outlier tokens: the largest norm is not 4
            times the median one at any block.
        AlreadyPatched, BadOption, LayerOutOfRange, BadBatch, NonFiniteActivation: see their
        messages; the model is as it was.
    """
    host = find_host(model)
    linears = _linears(host)
    _check_options(host, count, layer, threshold)
    check_loaded(host)
    with reading(host.model):
        batches = with_bar(as_batches(host, images), "register neurons", progress)
        sample: list[tuple[dict[str, Any], _Norms]] = []
        if layer is None or threshold is None:
            sample = _sample(host, batches)
            layer, threshold = _chosen([norms for _, norms in sample], layer, threshold)
        layer = int(layer)
        sums = _Sums(count)
        for batch, norms in chain(sample, ((batch, _norms(host, batch)) for batch in batches)):
            outliers = (norms.values[layer] > threshold) & norms.patches
            if outliers.any():
                sums.add(host, linears[: layer + 1], batch, outliers)
    if not sums.images:
        raise BadOption(
            f"threshold: {threshold:g}, but no patch has a larger norm at the output of block"
            f" {layer}; give a lower one, or threshold=None."
        )
    return RegisterNeurons(
        sums.largest(),
        host.architecture,
        len(host.blocks),
        host.width,
        layer,
        float(threshold),
        sums.images,
        sums.tokens,
    )


class _Norms(NamedTuple):
    """Norms of the tokens of a batch at the output of every block (L, B, T) float32, and which
    tokens are patches (B, T); on the CPU.
    """

    values: Tensor
    patches: Tensor


def _norms(host: Host, batch: dict[str, Any]) -> _Norms:
    seen: dict[int, Tensor] = {}
    with observed(host, lambda layer, hidden: seen.update({layer: hidden.float().norm(dim=-1)})):
        host.adapter.run(host.model, batch)
    missing = [layer for layer in range(len(host.blocks)) if layer not in seen]
    if missing:
        raise UnsupportedModel(
            f"model: blocks {missing} did not run; layers that are skipped at random cannot be"
            " measured."
        )
    values = torch.stack([seen[layer].cpu() for layer in range(len(host.blocks))])
    if not values.isfinite().all():
        raise NonFiniteActivation(
            "images: a block's output holds NaN or infinity; run the model in bfloat16 or float32,"
            " and look at its inputs and weights."
        )
    rows, tokens = values.shape[1:]
    return _Norms(
        values,
        host.adapter.token_roles(host.model, batch, (rows, tokens)).cpu()
        == host.roles.index("patch"),
    )


def _sample(host: Host, batches: Iterator[dict[str, Any]]) -> list[tuple[dict[str, Any], _Norms]]:
    """The first batches, of `SAMPLE` images or more together, with their norms."""
    sample: list[tuple[dict[str, Any], _Norms]] = []
    for batch in batches:
        sample.append((batch, _norms(host, batch)))
        if sum(len(norms.patches) for _, norms in sample) >= SAMPLE:
            break
    return sample


def _chosen(sample: list[_Norms], layer: int | None, threshold: float | None) -> tuple[int, float]:
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


class _Sums:
    """For each layer the sum, over images, of the mean magnitude of every neuron at an image's
    outlier tokens: (N,) float64.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.of: list[Tensor] = []
        self.images = self.tokens = 0

    def add(
        self, host: Host, linears: list[nn.Module], batch: dict[str, Any], outliers: Tensor
    ) -> None:
        """Run a batch and take its activations: outliers (B, T) bool on the CPU."""
        counts = outliers.sum(1, keepdim=True)
        weights = (1 / counts.clamp(min=1)).expand(outliers.shape)[outliers]
        seen: dict[int, Tensor] = {}

        def see(layer: int, _: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if x.shape[:-1] != outliers.shape:
                raise UnsupportedModel(
                    f"model: the second linear layer of the MLP of block {layer} reads"
                    f" {tuple(x.shape)} where the block has {tuple(outliers.shape)} tokens;"
                    " register an adapter whose mlp_out() is right."
                )
            seen[layer] = weights.to(x.device) @ x[outliers.to(x.device)].abs().float()

        with ExitStack() as undo:
            for layer, linear in enumerate(linears):
                undo.callback(linear.register_forward_pre_hook(partial(see, layer)).remove)
            host.adapter.run(host.model, batch)
        missing = [layer for layer in range(len(linears)) if layer not in seen]
        if missing:
            raise UnsupportedModel(
                f"model: the second linear layer of the MLP did not run in blocks {missing};"
                " register an adapter whose mlp_out() is right."
            )
        means = [seen[layer].double().cpu() for layer in range(len(linears))]
        there = sum(map(len, means))
        if self.count > there:
            raise BadOption(
                f"count: {self.count}, but there are only {there} neurons up to block"
                f" {len(means) - 1}; give fewer."
            )
        self.of = [a + b for a, b in zip(self.of, means)] if self.of else means
        self.images += int((counts > 0).sum())
        self.tokens += int(counts.sum())

    def largest(self) -> tuple[RegisterNeuron, ...]:
        """The `count` neurons with the largest means over images, in descending order."""
        places = [
            (layer, neuron) for layer, sums in enumerate(self.of) for neuron in range(len(sums))
        ]
        means, order = torch.cat(self.of).div(self.images).topk(self.count)
        return tuple(
            RegisterNeuron(layer, neuron, mean)
            for (layer, neuron), mean in zip(
                (places[index] for index in order.tolist()), means.tolist()
            )
        )


def _linears(host: Host) -> list[nn.Module]:
    """The second linear layer of every block's MLP."""
    if not isinstance(host.adapter, ImageAdapter):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads text; register neurons are of vision"
            " transformers."
        )
    if added_tokens(host.blocks[0]):
        raise AlreadyPatched(
            "model: a test-time register is on it, where its outlier tokens have gone;"
            " unpatch_model(model, 'test_time_registers') first."
        )
    return [host.adapter.mlp_out(host.model, block) for block in host.blocks]


def _check_options(host: Host, count: int, layer: int | None, threshold: float | None) -> None:
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise BadOption(f"count: {count!r}; give an integer of at least 1.")
    if layer is not None and (not isinstance(layer, Integral) or isinstance(layer, bool)):
        raise BadOption(f"layer: {layer!r}; give the index of a block, or None.")
    if layer is not None and not 0 <= layer < len(host.blocks):
        raise LayerOutOfRange(
            f"layer: {layer} is outside the model's blocks 0 to {len(host.blocks) - 1}."
        )
    if threshold is not None and (not isinstance(threshold, Real) or not 0 < threshold < math.inf):
        raise BadOption(f"threshold: {threshold!r}; give a positive number, or None.")
