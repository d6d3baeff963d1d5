"""Linear classification on frozen features, with DINOv2's published heads or a fitted one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.adapters.devices import input_device
from biassurgery.errors import BadOption, FileError, warn
from biassurgery.evaluate.counting import accuracy
from biassurgery.evaluate.features import Features, called, class_and_patch_features, extract
from biassurgery.evaluate.labelled import LabelledBatch, image_host
from biassurgery.findings.files import CORRUPT, as_path, told
from biassurgery.findings.finding import check_finite
from biassurgery.findings.torch_files import read_torch
from biassurgery.measure.ranks import Group, taking_part

_LAYERS = (1, 4)  # of the published heads
_FLAT = 1e-4  # a gradient of the mean loss below which its minimum counts as reached


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear classifier: logits = features @ weight.T + bias.

    Attributes:
        weight: (classes, features) float32.
        bias: (classes,) float32.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[:1]:
            raise BadOption(
                f"head: weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}; give"
                " (classes, features) and (classes,)."
            )
        numbers = {"weight": self.weight, "bias": self.bias}
        check_finite("head", numbers, "fit or fetch it again")

    @classmethod
    def load(cls, path: str | Path) -> LinearHead:
        """Read a state dict with `weight` and `bias`, as published for DINOv2.

        Those are `dinov2_vit*14_linear_head.pth` and `..._linear4_head.pth`, with and without
        `_reg4`. Nothing else in the file is run.

        Raises:
            FileError: it cannot be read, or holds something else.
        """
        path = as_path("path", path)
        try:
            state = read_torch(path)
            return cls(state["weight"].float(), state["bias"].float())
        except (FileError, RuntimeError, *CORRUPT) as error:
            raise FileError(
                f"path: {path} holds no linear head ({told(error)}); give a state dict with weight"
                " (classes, features) and bias (classes,)."
            ) from error

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def to(self, device: torch.device) -> LinearHead:
        """The head on a device, in float32."""
        return LinearHead(
            self.weight.to(device, torch.float32), self.bias.to(device, torch.float32)
        )


def linear_accuracy(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    head: LinearHead,
    *,
    features: Features | None = None,
    progress: bool | None = None,
    resume: str | Path | None = None,
    checkpoint: str | Path | None = None,
    group: Group = None,
) -> float:
    """Share, 0 to 1, of images that a linear head on frozen features classifies rightly.

    As in Sun et al. 2024, table 5.

    Args:
        model: a model of a supported architecture.
        batches: pairs of normalised images (B, C, H, W) and labels (B,) int64, or dicts of the
            model's arguments with `labels`.
        head: `LinearHead.load(path)`, or what `fit_linear_head` returned.
        features: from model and images to what the head reads, (B, D); None: [CLS] of the last 1 or
            4 blocks, as the width of the head says, and the mean patch: see
            `class_and_patch_features`.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        resume: a JSON file to keep the counts of several evaluations in, so that an interrupted
            one goes on where it was, and one of another model, head or first batch begins anew;
            None: nothing is kept.
        checkpoint: a file to keep the count of this evaluation in, so that it goes on where it was;
            one of another model, head or other batches is refused. See docs/evaluation.md.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch: no batches, one that is not such a pair, or labels that the head does not have.
        BadOption: a head of another model, or `resume` or `checkpoint` with a loader that
            shuffles.
        FileError: `resume` or `checkpoint` cannot be used.
        NonFiniteActivation: NaN in the logits.
        UnsupportedModel: not an image model, or one without such features.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("linear_accuracy", model, group) as ranks:
        host = image_host(model, "linear accuracy")
        chosen: Features = features or partial(
            class_and_patch_features, layers=_layers(head, host.width)
        )
        classify = head.to(input_device(host.root))

        def logits(inputs: dict[str, Any]) -> Tensor:
            vectors = called(chosen, model, inputs)
            if vectors.shape[1] != head.weight.shape[1]:
                raise BadOption(
                    f"head: it reads {head.weight.shape[1]} numbers, but the features have"
                    f" {vectors.shape[1]}; give the head of these features."
                )
            return classify.to(vectors.device)(vectors)

        return accuracy(
            ranks,
            host,
            batches,
            logits,
            name="linear",
            progress=progress,
            resume=resume,
            checkpoint=checkpoint,
            head=(head.weight, head.bias, _name(features)),
            whose="the head",
        )


def fit_linear_head(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    layers: int = 1,
    features: Features | None = None,
    penalty: float = 1e-4,
    iterations: int = 1000,
    progress: bool | None = None,
    group: Group = None,
) -> LinearHead:
    """Logistic regression on frozen features, by L-BFGS.

    It is the minimum of mean cross-entropy + penalty / 2 * |weight|^2. All features are kept on the
    model's device, and the logits of all images are computed at once.

    Args:
        model: a model of a supported architecture.
        batches: pairs of normalised images (B, C, H, W) and labels (B,) int64, or dicts of the
            model's arguments with `labels`.
        layers: 1 or 4: how many blocks' [CLS] are read, see `class_and_patch_features`; not used
            with `features`.
        features: from model and images to (B, D).
        penalty: how strongly the weight is drawn to zero.
        iterations: at most so many; a warning says where the minimum was not reached.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: which ranks of `torch.distributed` fit the same head, each to all of `batches`, which
            they have to share: see `calibrate`.

    Raises:
        BadBatch: no batches, or one that is not such a pair.
        BadOption: `layers` or `penalty` cannot be used.
        NonFiniteActivation: NaN in the features.
        UnsupportedModel: not an image model, or one without such features.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("fit_linear_head", model, group) as ranks:
        if layers not in _LAYERS:
            raise BadOption(f"layers: {layers!r}; use one of {', '.join(map(str, _LAYERS))}.")
        if not penalty > 0:
            raise BadOption(
                f"penalty: {penalty!r}; give a positive number, without which there may be no"
                " minimum."
            )
        read, labels = extract(
            model,
            batches,
            features or partial(class_and_patch_features, layers=layers),
            name="linear, train",
            progress=progress,
            ranks=ranks,
        )
    head, steepest = _fitted(read, labels, penalty, iterations)
    if steepest > _FLAT:
        warn(
            f"iterations: {iterations} were not enough, the gradient still reaches {steepest:.1g};"
            " give more, or a larger penalty.",
        )
    return head


def _fitted(
    read: Tensor, labels: Tensor, penalty: float, iterations: int
) -> tuple[LinearHead, float]:
    """The head of least loss on features (N, D) and labels (N,), and the largest gradient left."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, read.shape[1], device=read.device, requires_grad=True)
    bias = torch.zeros(classes, device=read.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        misfit = F.cross_entropy(F.linear(read, weight, bias), labels)
        value = misfit + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()  # for the gradient at the end
    steepest = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    return LinearHead(weight.detach(), bias.detach()), steepest


def _layers(head: LinearHead, width: int) -> int:
    """How many blocks' [CLS] a head reads."""
    reads = head.weight.shape[1]
    layers = next((layers for layers in _LAYERS if reads == (layers + 1) * width), None)
    if layers is None:
        known = " or ".join(f"{(n + 1) * width} (layers: {n})" for n in _LAYERS)
        raise BadOption(
            f"head: it reads {reads} numbers, and for a model of width {width} that must be"
            f" {known}; load the head of this model, or pass features=."
        )
    return layers


def _name(features: Features | None) -> str:
    return (
        ""
        if features is None
        else f"{getattr(features, '__module__', '')}.{getattr(features, '__qualname__', features)}"
    )
