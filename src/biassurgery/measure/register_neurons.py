"""Register neurons: the few MLP neurons that make the outlier tokens of a vision transformer.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", section 3.2,
algorithm 1, appendix A.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.parallel import check_neurons
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import (
    AlreadyPatched,
    BadOption,
    LayerOutOfRange,
    UnsupportedModel,
)
from biassurgery.findings.register_neurons import RegisterNeuron, RegisterNeurons
from biassurgery.findings.sums import Sums
from biassurgery.measure.outlier_tokens import Norms, choose_layer, norms_of, sample_of
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import anywhere, in_step
from biassurgery.surgery.block import added_tokens
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.linear import InputEdit, check_linear


def find_register_neurons(
    model: nn.Module,
    images: Batch | Iterable[Batch],
    *,
    count: int = 10,
    layer: int | None = None,
    threshold: float | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> RegisterNeurons:
    """Find the neurons that make the outlier tokens of a vision transformer.

    For `patch_model(model, "test_time_registers", neurons=...)`. Outlier tokens are the patches
    whose norm at the output of a block is beyond a threshold. Of every neuron in the MLPs up to
    that block the mean magnitude at them is taken, over the outlier tokens of an image and then
    over images; the largest are the register neurons. The images are read once, in evaluation mode
    and without gradients; each batch with outlier tokens is run twice, so that no activations need
    to be kept. Memory does not grow with the number of images. Under `torch.distributed` every rank
    reads its own images and all get the same neurons.

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
            by the first batches, of 32 images or more together; of each rank, if there are several.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        UnsupportedModel: a text model, or one without outlier tokens: the largest norm is not 4
            times the median one at any block.
        AlreadyPatched, BadOption, LayerOutOfRange, BadBatch, NonFiniteActivation: see their
        messages; the model is as it was.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("find_register_neurons", model, group) as ranks:
        host = find_host(model)
        linears = _linears(host)
        _check_options(host, count, layer, threshold)
        check_loaded(host)
        ranks.same(count=count, layer=layer, threshold=threshold)
        with reading(host.model):
            checked = ranks.apart(as_batches(host, images))
            batches = with_bar(in_step(checked, host.root), "register neurons", progress)
            sample: list[tuple[dict[str, Any], Norms]] = []
            if layer is None or threshold is None:
                sample = sample_of(host, batches)
                norms_of_all = ranks.total([norms for _, norms in sample])
                layer, threshold = choose_layer(norms_of_all, layer, threshold)
            rest = ((batch, norms_of(host, batch)) for batch in batches)
            activity = _Activity(count)
            for batch, norms in chain(sample, rest):
                outliers = (norms.values[layer] > threshold) & norms.patches
                if anywhere(bool(outliers.any()), host.root):
                    activity.add(host, linears[: layer + 1], batch, outliers)
        activity = ranks.total(activity)
    return activity.found(host, layer, threshold)


class _OutlierEdit(InputEdit):
    """Sums, over a batch's images, each neuron's mean magnitude at an image's outlier tokens.

    Two images with outliers at tokens 1, 2 and at token 0 have the weights 1/2, 1/2, 1: one for
    each token that the mask picks, in its order.

    Args:
        layer: of the MLP whose second linear layer this is on.
        outliers: (B, T) bool, on the CPU.

    Attributes:
        sums: (N,) float32; None until the layer has run.
    """

    def __init__(self, layer: int, outliers: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.outliers = outliers
        counts = outliers.sum(1, keepdim=True)
        self.weights = (1 / counts.clamp(min=1)).expand(outliers.shape)[outliers]
        self.sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1] != self.outliers.shape:
            raise UnsupportedModel(
                f"model: the second linear layer of the MLP of block {self.layer} reads"
                f" {tuple(x.shape)} where the block has {tuple(self.outliers.shape)} tokens;"
                " register an adapter whose mlp_out() is right."
            )
        activations = x[self.outliers.to(x.device)].abs().float()
        self.sums = self.weights.to(x.device) @ activations
        return x


class _Activity:
    """How active the neurons are at outlier tokens.

    Attributes:
        sums: for each layer the sum, over images, of the mean magnitude of every neuron at an
            image's outlier tokens: (N,) float64.
        images, tokens: with outlier tokens, and these.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.sums = Sums()
        self.images = 0
        self.tokens = 0

    def add(
        self, host: Host, linears: list[nn.Module], batch: dict[str, Any], outliers: Tensor
    ) -> None:
        """Run a batch and take its activations: outliers (B, T) bool on the CPU."""
        edits = [_OutlierEdit(layer, outliers) for layer in range(len(linears))]
        places = [Place(edit.layer, linears[edit.layer], edit) for edit in edits]
        with attached(places):
            host.adapter.run(host.model, batch)
        missing = [edit.layer for edit in edits if edit.sums is None]
        if missing:
            raise UnsupportedModel(
                f"model: the second linear layer of the MLP did not run in blocks {missing};"
                " register an adapter whose mlp_out() is right."
            )
        for edit in edits:
            assert edit.sums is not None  # it is not missing
            self.sums.add(edit.layer, edit.sums.double())
        neurons = sum(map(len, self.sums.values()))
        if self.count > neurons:
            raise BadOption(
                f"count: {self.count}, but there are only {neurons} neurons up to block"
                f" {len(linears) - 1}; give fewer."
            )
        counts = outliers.sum(1)
        self.images += int((counts > 0).sum())
        self.tokens += int(counts.sum())

    def __add__(self, other: _Activity) -> _Activity:
        both = _Activity(self.count)
        both.sums = self.sums + other.sums
        both.images = self.images + other.images
        both.tokens = self.tokens + other.tokens
        return both

    def found(self, host: Host, layer: int, threshold: float) -> RegisterNeurons:
        """The finding, for outlier tokens with a norm above `threshold` at a block's output."""
        if not self.images:
            raise BadOption(
                f"threshold: {threshold:g}, but no patch has a larger norm at the output of block"
                f" {layer}; give a lower one, or threshold=None."
            )
        return RegisterNeurons(
            self.largest(),
            host.architecture,
            len(host.blocks),
            host.width,
            int(layer),
            float(threshold),
            self.images,
            self.tokens,
        )

    def largest(self) -> tuple[RegisterNeuron, ...]:
        """The `count` neurons with the largest means over images, in descending order."""
        neurons = [
            (layer, neuron) for layer, sums in self.sums.items() for neuron in range(len(sums))
        ]
        means, order = torch.cat(list(self.sums.values())).div(self.images).topk(self.count)
        largest = []
        for index, mean in zip(order.tolist(), means.tolist()):
            layer, neuron = neurons[index]
            largest.append(RegisterNeuron(layer, neuron, mean))
        return tuple(largest)


def _linears(host: Host) -> list[nn.Module]:
    """The second linear layer of every block's MLP."""
    if not isinstance(host.adapter, ImageAdapter):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads text; register neurons are of vision"
            " transformers."
        )
    check_neurons(host)
    if added_tokens(host.blocks[0]):
        raise AlreadyPatched(
            "model: a test-time register is on it, where its outlier tokens have gone;"
            " unpatch_model(model, 'test_time_registers') first."
        )
    linears = [host.adapter.mlp_out(host.model, block) for block in host.blocks]
    for layer, linear in enumerate(linears):
        check_linear(linear, layer)
    return linears


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
