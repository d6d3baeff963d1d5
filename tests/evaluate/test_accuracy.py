"""Top-1 accuracy of models of images against a loop over images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel
from biassurgery.evaluate import top1_accuracy
from tests.models import images, planted, planted_vit
from tests.state import untouched


def labelled(model: Any, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Images with labels of which every second one is what the model says."""
    pixels = images(rows)
    with torch.no_grad():
        said = torch.tensor([int(model(image[None])[0].argmax()) for image in pixels])
    return pixels, torch.where(torch.arange(rows) % 2 == 0, said, (said + 1) % 5)


def test_accuracy_counts_images_not_batches() -> None:
    model = planted_vit()
    pixels, labels = labelled(model)
    assert top1_accuracy(model, [(pixels, labels)]) == 0.5
    assert top1_accuracy(model, [(pixels[:1], labels[:1]), (pixels[1:], labels[1:])]) == 0.5
    assert (
        top1_accuracy(
            model, [(pixels[::2], labels[::2]), ({"pixel_values": pixels[1:2]}, labels[1:2])]
        )
        == 0.75
    )
    assert top1_accuracy(model, iter([[pixels[1::2], labels[1::2].int()]])) == 0.0


def test_accuracy_leaves_the_model_as_it_was() -> None:
    model = planted_vit(proj_drop_rate=0.5)
    pixels, labels = labelled(model)
    model.train()
    with untouched(model):
        assert top1_accuracy(model, [(pixels, labels)]) == 0.5


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are none"),
        ([images(2)], "a batch is a Tensor; give pairs"),
        ((images(2), torch.tensor([0, 1])), "a batch is a Tensor; give pairs"),
        ([(images(2), [0, 1])], "give pairs"),
        ([(images(2), torch.tensor([0]))], "one class index"),
        ([(images(2), torch.tensor([0.0, 1.0]))], "one class index"),
        (
            [(images(2), torch.tensor([0, 5]))],
            "labels reach from 0 to 5, but the model has 5 classes",
        ),
        ([(images(2), torch.tensor([-1, 0]))], "labels reach from -1"),
        ([(images(2)[:0], torch.zeros(0, dtype=torch.int64))], "is empty"),
        ([(images(2)[0], torch.tensor([0]))], "pixel_values"),
    ],
)
def test_accuracy_refuses(batches: Any, message: str) -> None:
    model = planted_vit()
    with untouched(model), pytest.raises(BadBatch, match=message):
        top1_accuracy(model, batches)


def test_models_that_have_no_accuracy() -> None:
    pairs = [(images(2), torch.tensor([0, 1]))]
    with pytest.raises(UnsupportedModel, match="perplexity"):
        top1_accuracy(planted("llama"), pairs)
    headless = planted_vit()
    headless.reset_classifier(0)
    with pytest.raises(UnsupportedModel, match="num_classes=0"):
        top1_accuracy(headless, pairs)
    broken = planted_vit()
    broken.head.bias.data[0] = math.nan
    with pytest.raises(NonFiniteActivation, match="NaN"):
        top1_accuracy(broken, pairs)
