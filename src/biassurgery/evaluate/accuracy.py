"""Top-1 accuracy of an image classifier."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.sharing import without_ddp
from biassurgery.errors import UnsupportedModel
from biassurgery.evaluate.counting import accuracy
from biassurgery.evaluate.labelled import LabelledBatch, image_host
from biassurgery.measure.ranks import Group, taking_part


def top1_accuracy(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    progress: bool | None = None,
    resume: str | Path | None = None,
    checkpoint: str | Path | None = None,
    group: Group = None,
) -> float:
    """Share, 0 to 1, of images whose largest logit is that of their label.

    Args:
        model: an image classifier of a supported architecture.
        batches: pairs of normalised images (B, C, H, W) and labels (B,) int64, as loaders of timm
            and torchvision yield them, or dicts of the model's arguments with `labels`.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        resume: a JSON file to keep the counts of several evaluations in, so that an interrupted
            one goes on where it was, and one of another model, head or first batch begins anew;
            None: nothing is kept.
        checkpoint: a file to keep the count of this evaluation in, so that it goes on where it was;
            one of another model, head or other batches is refused. See docs/evaluation.md.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch: no batches, one that is not such a pair, or labels that the model does not have.
        BadOption, FileError: `resume` or `checkpoint` cannot be used.
        NonFiniteActivation: NaN in the logits.
        UnsupportedModel: not an image model, or one without a classifier.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("top1_accuracy", model, group) as ranks:
        host = image_host(model, "top-1 accuracy")
        _check_classifies(host.root)
        classifier = without_ddp(model)

        def logits(inputs: dict[str, Any]) -> Tensor:
            output = classifier(inputs.pop("pixel_values"), **inputs)
            return host.adapter.logits(host.root, output)

        return accuracy(
            ranks,
            host,
            batches,
            logits,
            name="top-1",
            progress=progress,
            resume=resume,
            checkpoint=checkpoint,
        )


def _check_classifies(model: nn.Module) -> None:
    """Refuse what returns features, which would pass for logits."""
    kind = type(model).__name__
    if hasattr(model, "encode_image") or hasattr(model, "get_image_features"):
        raise UnsupportedModel(
            f"model: {kind} compares images with texts and has no classifier; use"
            " zero_shot_accuracy(model, batches, zero_shot_head(model, tokenizer, class_names))."
        )
    if getattr(model, "num_classes", None) == 0:
        raise UnsupportedModel(
            f"model: {kind} has num_classes=0 and so no classifier; create it with its classes, or"
            " use linear_accuracy or knn_accuracy."
        )
    if isinstance(getattr(model, "head", getattr(model, "classifier", None)), nn.Identity):
        raise UnsupportedModel(
            f"model: {kind} returns features, for it has no classifier; use linear_accuracy or"
            " knn_accuracy."
        )
