"""Weighted k-nearest-neighbour classification on frozen features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.errors import BadOption
from biassurgery.evaluate.counting import accuracy
from biassurgery.evaluate.features import Features, called, extract, image_features
from biassurgery.evaluate.labelled import LabelledBatch, image_host
from biassurgery.measure.ranks import Group, taking_part


def knn_accuracy(
    model: nn.Module,
    train: Iterable[LabelledBatch],
    test: Iterable[LabelledBatch],
    *,
    k: int = 20,
    temperature: float = 0.07,
    features: Features | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> float:
    """Share, 0 to 1, of test images whose label wins the votes of the k nearest in training.

    Source: Caron et al. 2021, appendix. Each neighbour votes for its class with weight exp(cosine
    similarity / temperature). The features of all training images are kept on the model's device, 4
    bytes a number; images are not.

    Args:
        model: a model of a supported architecture.
        train, test: pairs of normalised images (B, C, H, W) and labels (B,) int64, or dicts of the
            model's arguments with `labels`.
        k: neighbours that vote.
        temperature: the smaller, the more the nearest count.
        features: from model and images to (B, D); None: `image_features`.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        group: whose test images are added up under `torch.distributed`, see `calibrate`; `train` is
            the same on all ranks.

    Raises:
        BadBatch: no batches, one that is not such a pair, or labels beyond those of `train`.
        BadOption: `k` or `temperature` cannot be used.
        NonFiniteActivation: NaN in the features.
        UnsupportedModel: not an image model, or one without such features.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("knn_accuracy", model, group) as ranks:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise BadOption(f"k: {k!r}; give a number of neighbours, at least 1.")
        if not temperature > 0:
            raise BadOption(f"temperature: {temperature!r}; give a positive number.")
        ranks.same(k=k, temperature=temperature)
        host = image_host(model, "k-NN accuracy")
        chosen = features or image_features
        bank, classes = extract(
            model, train, chosen, name="k-NN, train", progress=progress, ranks=ranks
        )
        if k > len(bank):
            raise BadOption(
                f"k: {k}, but train holds {len(bank)} images; give more of them, or a smaller k."
            )
        bank = F.normalize(bank, dim=1)
        count = int(classes.max()) + 1

        def votes(inputs: dict[str, Any]) -> Tensor:
            vectors = F.normalize(called(chosen, model, inputs), dim=1)
            nearest, which = (vectors @ bank.T).topk(k)
            # exp(nearest / temperature) up to a factor an image, without which it may overflow
            weights = torch.softmax(nearest / temperature, 1)
            # Neighbours of classes 2, 0, 2 with weights 0.5, 0.3, 0.2 give the votes 0.3, 0, 0.7.
            return weights.new_zeros(len(vectors), count).scatter_add_(1, classes[which], weights)

        return accuracy(
            ranks, host, test, votes, name="k-NN, test", progress=progress, whose="train"
        )
