"""Top-1 accuracy of an image classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import find_host
from biassurgery.batches import Batch, as_inputs
from biassurgery.devices import input_device
from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel
from biassurgery.evaluate.common import logits_of, with_bar
from biassurgery.measure import eval_mode


def top1_accuracy(model: nn.Module, batches: Iterable[tuple[Batch, Tensor]], *, progress: bool | None = None) -> float:
    """Share, 0 to 1, of images whose largest logit is that of their label.

    Args:
        model: an image classifier of a supported architecture.
        batches: pairs of normalised images (B, C, H, W) and labels (B,) int64.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        BadBatch: no batches, one that is not such a pair, or labels that the model does not have.
        NonFiniteActivation: NaN in the logits.
        UnsupportedModel: not an image model, or one without a classifier.
    """
    host = find_host(model)
    if host.adapter.modality != "image":
        raise UnsupportedModel(f"model: {type(host.model).__name__} reads text, and top-1 accuracy is of image classifiers; use "
                               "perplexity(model, data).")
    if getattr(host.model, "num_classes", None) == 0:
        raise UnsupportedModel(f"model: {type(host.model).__name__} has num_classes=0 and so no classifier; create it with its classes.")
    device, right, count = input_device(host.model), 0, 0
    with torch.no_grad(), eval_mode(host.model):
        for pair in with_bar(batches, "top-1", progress):
            images, labels = _checked(pair)
            inputs = as_inputs(host, images, device)
            logits = logits_of(model(inputs.pop("pixel_values"), **inputs))
            _check_fit(labels, logits)
            right += int((logits.argmax(-1) == labels.to(logits.device)).sum())
            count += len(labels)
    if not count:
        raise BadBatch("batches: there are none; give at least one pair of images and labels.")
    return right / count


def _checked(pair: Any) -> tuple[Any, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Tensor):
        raise BadBatch(f"batches: a batch is a {type(pair).__name__}; give pairs of images (B, C, H, W) and labels (B,) int64, in a list "
                       "even if there is only one.")
    return pair[0], pair[1]


def _check_fit(labels: Tensor, logits: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise BadBatch(f"batches: labels are {labels.dtype} {tuple(labels.shape)} for logits {tuple(logits.shape)}; give one class index "
                       "(int64) an image.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise BadBatch(f"batches: labels reach from {low} to {high}, but the model has {logits.shape[1]} classes from 0 on; give the "
                       "labels of the data that it was trained on.")
    if logits.isnan().any():
        raise NonFiniteActivation("batches: the logits hold NaN; run the model in bfloat16 or float32, and look at its weights.")
