"""Features of images, and k-NN on them, against loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.data.reading import ImageBatches, image_files
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.evaluate import (
    class_and_patch_features,
    compare,
    image_features,
    knn_accuracy,
)
from tests.evaluate.by_hand import as_points, by_hand_knn
from tests.state import untouched
from tests.tiny_vision import (
    CLASSES,
    WIDTH,
    WITH_CLS,
    blocks_by_hand,
    check,
    double,
    linear_input,
    pictures,
    split,
    tiny,
)

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg"
PHOTOGRAPHS = SHARED / "images" / "imagenet_sample_200"
ABSENT = "the folder `shared` beside the repository, with trained weights and images, is absent"


# Features


@pytest.mark.parametrize("family", WITH_CLS)
@pytest.mark.parametrize("layers", [1, 4])
@torch.no_grad()
def test_class_and_patch_features(family: str, layers: int) -> None:
    model = tiny(family)
    x = pictures(4)
    with untouched(model):
        found = class_and_patch_features(model, x, layers=layers)
    expected = linear_input(family, model, x, layers)
    assert found.shape == (4, (layers + 1) * WIDTH)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    if family.startswith("timm"):
        own = model.get_intermediate_layers(x, n=layers, return_prefix_tokens=True, norm=True)
        assert torch.equal(
            found, torch.cat([*(prefix[:, 0] for _, prefix in own), own[-1][0].mean(1)], 1)
        )


@pytest.mark.parametrize(
    "family",
    [*WITH_CLS, "timm_mean", "clip", "clip_vision", "clip_projected", "siglip", "open_clip"],
)
@torch.no_grad()
def test_image_features(family: str) -> None:
    model = tiny(family)
    x = pictures(4)
    wide = double(model)
    if family in WITH_CLS:
        expected = linear_input(family, model, x, 1)[:, :WIDTH]
    elif family == "timm_mean":
        expected = wide.fc_norm(blocks_by_hand(family, wide, x.double())[-1][:, 1:].mean(1))
    elif family == "clip_vision":
        expected = wide(x.double()).pooler_output
    elif family == "clip_projected":
        expected = wide(x.double()).image_embeds
    elif family == "open_clip":
        expected = wide.visual(x.double())
    else:
        expected = wide.vision_model(x.double()).pooler_output
        expected = wide.visual_projection(expected) if family == "clip" else expected
    with untouched(model):
        found = image_features(model, x)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@torch.no_grad()
def test_mae_reads_all_patches_in_order() -> None:
    model = tiny("mae")
    x = pictures(4)
    assert model.config.mask_ratio == 0.75
    found = image_features(model, x)
    assert torch.equal(
        found, image_features(model, x)
    )  # although the model itself drops patches at random
    wide = double(model)
    wide.config.mask_ratio = 0.0
    order = torch.arange(16.0).expand(4, -1)
    assert torch.allclose(
        found.double(), wide(x.double(), noise=order).last_hidden_state[:, 0], atol=1e-4
    )


@torch.no_grad()
def test_models_without_such_features() -> None:
    from tests.models import planted

    x = pictures(2)
    with pytest.raises(UnsupportedModel, match="reads text"):
        image_features(planted("llama"), x)
    with pytest.raises(
        UnsupportedModel, match=r"no \[CLS\] token with a final norm.*features=image_features"
    ):
        class_and_patch_features(tiny("open_clip"), x)
    with pytest.raises(BadOption, match="layers: 6, but VisionTransformer has 5 blocks"):
        class_and_patch_features(tiny("timm"), x, layers=6)
    with pytest.raises(UnsupportedModel, match=r"features: \(2, 7, 3\) for 2 images"):
        knn_accuracy(
            tiny("timm"),
            [(x, torch.tensor([0, 1]))],
            [],
            k=1,
            features=lambda _, x: torch.zeros(len(x), 7, 3),
        )


@pytest.mark.parametrize("family", ["timm", "hub_registers", "dinov2", "clip", "open_clip"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5)])
def test_knn_against_a_loop(family: str, k: int, temperature: float) -> None:
    model = tiny(family)
    known = pictures(40, seed=5)
    x = pictures()
    labels = torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        train, test = (image_features(double(model), pixels.double()) for pixels in (known, x))
    said = by_hand_knn(train, labels.tolist(), test, k, temperature)
    batches = split(known, labels, (16, 16, 8))
    with untouched(model):
        check(
            lambda pairs: knn_accuracy(model, batches, pairs, k=k, temperature=temperature),
            x,
            said,
            int(labels.max()) + 1,
        )


def points(*degrees: float) -> Tensor:
    """Images whose first two pixels are a direction, of different lengths."""
    pixels = torch.zeros(len(degrees), 3, 28, 28)
    for row, angle in enumerate(math.radians(degree) for degree in degrees):
        pixels[row, 0, 0, :2] = torch.tensor([math.cos(angle), math.sin(angle)]) * (row + 1)
    return pixels


def test_near_neighbours_outvote_many_at_a_low_temperature_only() -> None:
    train = [(points(5, 40, 41, 42, 180), torch.tensor([2, 1, 1, 1, 0]))]
    model = tiny("timm")

    def said(k: int, temperature: float, label: int) -> float:
        return knn_accuracy(
            model,
            train,
            [(points(0), torch.tensor([label]))],
            k=k,
            temperature=temperature,
            features=as_points,
        )

    assert said(4, 0.07, 2) == 1.0  # exp((cos 5 - cos 41) / 0.07) = 31 votes against 3
    assert said(4, 1.0, 1) == 1.0
    assert said(1, 1.0, 2) == 1.0
    assert said(4, 0.001, 2) == 1.0  # exp(1 / 0.001) is beyond float64
    assert said(5, 1.0, 0) == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, BadOption, "k: 0"),
        ({"k": True}, BadOption, "k: True"),
        ({"k": 3}, BadOption, "train holds 2 images"),
        ({"temperature": 0.0}, BadOption, "temperature: 0.0"),
        ({"temperature": math.nan}, BadOption, "temperature: nan"),
        ({"train": []}, BadBatch, "there are none"),
        ({"test": []}, BadBatch, "there are none"),
        ({"train": [(points(0, 9), torch.tensor([0, -1]))]}, BadBatch, "a label is -1"),
        (
            {"test": [(points(0), torch.tensor([2]))]},
            BadBatch,
            "labels reach from 2 to 2, but train has 2 classes",
        ),
    ],
)
def test_knn_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny("timm")
    call: dict[str, Any] = {
        "train": [(points(0, 90), torch.tensor([0, 1]))],
        "test": [(points(1), torch.tensor([0]))],
        "k": 1,
    }
    with untouched(model), pytest.raises(error, match=message):
        knn_accuracy(model, **(call | options))


# A trained model


@pytest.mark.skipif(not (VIT.is_dir() and PHOTOGRAPHS.is_dir()), reason=ABSENT)
def test_knn_of_a_trained_vision_transformer() -> None:
    """Mirrored close-ups find the photograph that they are from: fewer without massive activations,
    as many with their mean.
    """
    from torchvision.transforms.functional import center_crop, hflip, resize

    from biassurgery.data.loading import load_model

    weights = next(VIT.glob("*.safetensors"))
    model = load_model("vit_tiny_patch16_224", weights=weights, device="cpu").model
    files = image_files(PHOTOGRAPHS, 1000)[:40]
    whole = torch.cat([batch[0] for batch in ImageBatches(files, model, 20)])
    labels = torch.arange(40)
    close = resize(hflip(center_crop(whole, [56, 56])), [224, 224], antialias=True)
    sites = bs.calibrate(model, [whole[:12]])
    assert {(site.layer, site.channel) for site in sites} >= {(7, 41)}
    table = compare(
        model,
        lambda host: {
            "knn": knn_accuracy(
                host, split(whole, labels, (20, 20)), split(close, labels, (20, 20)), k=1
            )
        },
        [None, "set_zero", "set_mean"],
        sites=sites,
    )
    assert table[None]["knn"] == pytest.approx(37 / 40, abs=0.026)
    assert table["set_zero"]["knn"] == pytest.approx(33 / 40, abs=0.026)
    assert table["set_mean"]["knn"] == pytest.approx(table[None]["knn"], abs=0.026)
