"""Register neurons, found as a loop over images and tokens finds them (Jiang et al. 2025)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import (
    BadBatch,
    BadOption,
    LayerOutOfRange,
    NonFiniteActivation,
    UnsupportedModel,
)
from tests import models
from tests.edits.plain_hooks import neurons_of, random_vit
from tests.models import (
    CHANNEL,
    HIDDEN,
    LAYER,
    LAYERS,
    PATCHES,
    START_ID,
    images,
    planted_vit,
)
from tests.state import output_of, untouched

# -- finding the neurons


def captured(model: Any, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What every second MLP layer reads, and what every block returns."""
    read: list[Tensor] = []
    returned: list[Tensor] = []
    hooks = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for block in model.blocks
    ]
    hooks += [
        block.register_forward_hook(lambda _, __, output: returned.append(output))
        for block in model.blocks
    ]
    output_of(model, batch)
    for hook in hooks:
        hook.remove()
    return read, returned


def by_loop(
    model: Any, batch: Tensor, layer: int, threshold: float, prefix: int
) -> tuple[dict[tuple[int, int], float], int, int]:
    """Algorithm 1, one image at a time: the score of each neuron, images and outlier tokens."""
    scores: dict[tuple[int, int], list[float]] = {}
    tokens = 0
    for image in batch.split(1):
        read, returned = captured(model, image)
        outliers = [
            t
            for t in range(prefix, returned[layer].shape[1])
            if math.sqrt(sum(v * v for v in returned[layer][0, t].tolist())) > threshold
        ]
        tokens += len(outliers)
        for index in range(layer + 1 if outliers else 0):
            for neuron in range(read[index].shape[-1]):
                values = [abs(read[index][0, t, neuron].item()) for t in outliers]
                scores.setdefault((index, neuron), []).append(sum(values) / len(values))
    counts = {len(values) for values in scores.values()}
    return (
        {place: sum(values) / len(values) for place, values in scores.items()},
        counts.pop(),
        tokens,
    )


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=str)
def test_the_planted_neuron_is_found(options):
    model = planted_vit(torch.float64, **options)
    batch = images(6).double()
    prefix = 1 + options.get("reg_tokens", 0)
    with untouched(model, batch):
        found = bs.find_register_neurons(model, [batch[:4], batch[4:]], count=4)
    assert found.outlier_layer == LAYER
    assert (found.images, found.tokens) == (6, 6 * len(PATCHES))
    assert found.neurons[0][:2] == (LAYER, START_ID)
    assert (found.architecture, found.layers, found.width) == ("timm_vit", LAYERS, HIDDEN)
    scores, *counts = by_loop(model, batch, LAYER, found.threshold, prefix)
    assert counts == [6, 6 * len(PATCHES)]
    assert [(each.layer, each.neuron) for each in found.neurons] == sorted(
        scores, key=lambda place: -scores[place]
    )[:4]
    for each in found.neurons:
        assert each.activation == pytest.approx(scores[each.layer, each.neuron], rel=1e-6)
    assert found.by_layer()[LAYER][0] == START_ID
    assert found.first(1).neurons == found.neurons[:1]

    norms = torch.stack(
        [hidden[:, prefix:].norm(dim=-1) for hidden in captured(model, batch)[1]]
    )  # (L, B, patches)
    assert found.threshold == pytest.approx(
        math.sqrt(norms[LAYER].median() * norms[LAYER].amax(1).mean()), rel=1e-5
    )


def test_the_massive_activation_moves_to_the_token():
    model = planted_vit()
    batch = images(6)
    before = captured(model, batch)[1][LAYER][:, 1:, CHANNEL]
    assert before.abs().amax(1).min() > 2000
    bs.patch_model(
        model, "test_time_registers", neurons=bs.find_register_neurons(model, batch, count=1)
    )
    with bs.record(model, "block_output") as rec:
        model(batch)
    for layer in range(LAYER, LAYERS):
        values = rec["block_output"][layer][..., CHANNEL].abs()
        assert values[:, 1].min() > 1500
        assert values.index_select(1, torch.tensor([0, *range(2, values.shape[1])])).max() < 300


def test_means_over_images_are_of_those_with_outliers():
    model = random_vit()
    batch = images(8).double()
    norms = captured(model, batch)[1][2][:, 1:].norm(dim=-1)
    threshold = (
        norms.amax(1).sort().values[3:5].mean().item()
    )  # four of the eight images are beyond it
    found = bs.find_register_neurons(
        model,
        [(images(8).double()[i : i + 1], torch.zeros(1)) for i in range(8)],
        count=5,
        layer=2,
        threshold=threshold,
    )
    scores, images_with, tokens = by_loop(model, batch, 2, threshold, 1)
    assert (found.images, found.tokens) == (images_with, tokens)
    assert images_with == 4
    for each, place in zip(found.neurons, sorted(scores, key=lambda place: -scores[place])):
        assert (each.layer, each.neuron) == place
        assert each.activation == pytest.approx(scores[place], rel=1e-6)


def test_a_generator_is_read_once():
    model = planted_vit()
    batch = images(40)
    wanted = bs.find_register_neurons(model, batch.split(8))
    assert bs.find_register_neurons(model, (each for each in batch.split(8))) == wanted
    assert wanted.images == 40
    assert len(wanted.neurons) == 10


# -- refusals


def test_a_model_without_outlier_tokens():
    model = random_vit(torch.float32)
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match="no outlier tokens: the largest patch norm"),
    ):
        bs.find_register_neurons(model, images(4))
    with untouched(model), pytest.raises(UnsupportedModel, match="no outlier tokens at block 2"):
        bs.find_register_neurons(model, images(4), layer=2)
    with untouched(model), pytest.raises(BadOption, match="threshold: 1e\\+06, but no patch"):
        bs.find_register_neurons(model, images(4), layer=2, threshold=1e6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, BadOption, "count: 0"),
        ({"count": 2.5}, BadOption, "count: 2.5"),
        ({"count": True}, BadOption, "count: True"),
        ({"count": 10**6}, BadOption, "only 512 neurons up to block 1"),
        ({"layer": LAYERS}, LayerOutOfRange, "blocks 0 to 4"),
        ({"layer": "last"}, BadOption, "layer: 'last'"),
        ({"threshold": -1.0}, BadOption, "threshold: -1.0"),
        ({"threshold": float("nan")}, BadOption, "threshold: nan"),
    ],
)
def test_options_of_the_search(options, error, message):
    model = planted_vit()
    with untouched(model), pytest.raises(error, match=message):
        bs.find_register_neurons(model, images(3), **options)


def test_text_models_are_refused():
    model = models.planted("llama")
    neurons = neurons_of(random_vit())
    with untouched(model), pytest.raises(UnsupportedModel, match="reads text; register neurons"):
        bs.find_register_neurons(model, models.tokens())
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match="reads text; test-time registers"),
    ):
        bs.patch_model(model, "test_time_registers", neurons=neurons)


def test_bad_images():
    model = planted_vit()
    with untouched(model), pytest.raises(BadBatch, match="there are none"):
        bs.find_register_neurons(model, [])
    with untouched(model), pytest.raises(NonFiniteActivation, match="NaN"):
        bs.find_register_neurons(model, images(3).log())


# -- a trained model


SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg" / "vit_tiny_patch16_224.safetensors"
IMAGENET = SHARED / "images" / "imagenet_sample_200"
CORNERS = torch.tensor([1, 14, 183, 196])
MASSIVE_LAYER = 7
MASSIVE_CHANNEL = 41


@pytest.mark.skipif(
    not (VIT.is_file() and IMAGENET.is_dir()),
    reason="the folder `shared` beside the repository, with trained weights and images, is absent",
)
def test_a_trained_vit_keeps_its_accuracy_and_loses_its_outliers():
    import timm
    from safetensors.torch import load_file

    from biassurgery.data.reading import ImageBatches, image_files

    model: Any = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(VIT))
    files = image_files(IMAGENET, 1000)
    neurons = bs.find_register_neurons(model, ImageBatches(files[:100:2], model, 25))
    assert neurons.outlier_layer == MASSIVE_LAYER
    assert neurons.tokens == pytest.approx(4 * 50, abs=8)
    assert neurons.neurons[0][:2] == (MASSIVE_LAYER, 417)
    assert neurons.neurons[0].activation > 10 * neurons.neurons[1].activation

    odd = list(ImageBatches(files[1::2], model, 50))
    labels = torch.cat([each for _, each in odd])

    def run() -> tuple[float, Tensor]:
        with torch.no_grad(), bs.record(model, "block_output", layers=[MASSIVE_LAYER]) as rec:
            logits = [
                (model(pixels), rec["block_output"][MASSIVE_LAYER])[0] for pixels, _ in odd[:1]
            ]
            hidden = rec["block_output"][MASSIVE_LAYER]
        with torch.no_grad():
            logits += [model(pixels) for pixels, _ in odd[1:]]
        return (torch.cat(logits).argmax(1) == labels).float().mean().item(), hidden

    before, hidden = run()
    assert before == pytest.approx(0.86, abs=1e-6)
    assert hidden[:, CORNERS, MASSIVE_CHANNEL].mean() < -400
    with bs.patched(model, "test_time_registers", neurons=neurons):
        after, moved = run()
    assert after == pytest.approx(before, abs=0.0101)
    assert moved.shape[1] == hidden.shape[1] + 1
    assert moved[:, 1, MASSIVE_CHANNEL].mean() < -200
    patches = moved[:, 2:]
    assert patches[..., MASSIVE_CHANNEL].abs().max() < 30
    assert patches.norm(dim=-1).max() < 30
    assert hidden[:, CORNERS].norm(dim=-1).mean() > 400
