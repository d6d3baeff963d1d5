"""What is counted: classifiers of every library, pixels of every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from biassurgery.errors import BadOption, NonFiniteActivation, SurgeryError, UnsupportedModel
from biassurgery.evaluate import (
    LinearHead,
    fit_linear_head,
    knn_accuracy,
    linear_accuracy,
    top1_accuracy,
    zero_shot_head,
)
from tests.evaluate.by_hand import word_tokenizer
from tests.tiny_vision import (
    CLASSES,
    WIDTH,
    check,
    double,
    linear_input,
    pictures,
    split,
    tiny,
    winners,
)


def test_top1_says_what_to_use_instead() -> None:
    pairs = [(pictures(2), torch.tensor([0, 1]))]
    for family, message in (
        ("clip", "zero_shot_accuracy"),
        ("open_clip", "zero_shot_accuracy"),
        ("hub", "linear_accuracy"),
        ("dinov2", "no logits.*AutoModelForImageClassification"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            top1_accuracy(tiny(family), pairs)


def test_top1_of_a_classifier_of_transformers() -> None:
    model = tiny("dinov2_classifier")
    x = pictures()
    wide = double(model)
    scores = (
        linear_input("dinov2_classifier", model, x, 1) @ wide.classifier.weight.T
        + wide.classifier.bias
    )
    said = winners(scores.detach())
    check(lambda pairs: top1_accuracy(model, pairs), x, said)
    as_dicts = [{"pixel_values": pixels, "labels": labels} for pixels, labels in split(x, said)]
    assert top1_accuracy(model, as_dicts) == 1.0


def test_top1_of_a_classifier_of_the_hub() -> None:
    class LinearClassifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny("hub_registers")
            self.linear_head = nn.Linear(2 * WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            features = self.backbone.forward_features(x)
            return self.linear_head(
                torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)], 1)
            )

    model = LinearClassifier().eval()
    x = pictures()
    head = LinearHead(model.linear_head.weight.detach(), model.linear_head.bias.detach())
    said = winners(
        linear_input("hub_registers", model.backbone, x, 1) @ head.weight.double().T
        + head.bias.double()
    )
    check(lambda pairs: top1_accuracy(model, pairs), x, said)
    check(lambda pairs: linear_accuracy(model, pairs, head), x, said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_another_dtype(dtype: torch.dtype) -> None:
    model = tiny("timm").to(dtype)
    x = pictures()
    with torch.no_grad():
        said = [int(model(image[None].to(dtype))[0].argmax()) for image in x]
    assert (
        top1_accuracy(
            model, [(image[None], torch.tensor([label])) for image, label in zip(x, said)]
        )
        == 1.0
    )
    assert knn_accuracy(model, [(x, torch.tensor(said))], [(x, torch.tensor(said))], k=1) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model = tiny("dinov2")
    pairs = [(pictures(4), torch.tensor([0, 1, 2, 3]))]
    with pytest.raises(BadOption, match="bias is not finite"):
        LinearHead(torch.randn(4, 2 * WIDTH), torch.tensor([0.0, math.nan, 0.0, 0.0]))
    head = LinearHead(torch.randn(4, 2 * WIDTH), torch.zeros(4))
    head.bias.data[1] = math.nan  # it may become so later
    with pytest.raises(SurgeryError, match=r"not finite|logits hold NaN"):
        linear_accuracy(model, pairs, head)
    model.layernorm.bias.data[0] = value
    for call in (
        lambda: knn_accuracy(model, pairs, pairs, k=1),
        lambda: fit_linear_head(model, pairs),
    ):
        with pytest.raises(NonFiniteActivation, match="features hold NaN"):
            call()
    clip = tiny("clip")
    clip.text_projection.weight.data[0, 0] = value
    with pytest.raises(NonFiniteActivation, match="embeddings hold NaN"):
        zero_shot_head(clip, word_tokenizer(), ["cat"])
