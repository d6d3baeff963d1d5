"""Data of unknown length are read as they are needed: none of them is gone through beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import biassurgery as bs
from biassurgery import evaluate
from tests import models, vision
from tests.tiny_vision import pictures, tiny

AHEAD = 2  # batches that may be drawn before the first of them has been read
TEXTS = [models.tokens(2, 16, seed=seed) for seed in range(8)]
IMAGES = [models.images(2, seed=seed) for seed in range(8)]
LABELS = [torch.tensor([seed % 7, (seed + 3) % 7]) for seed in range(8)]
PAIRS = list(zip(pictures(16).split(2), LABELS, strict=True))


class Stream(IterableDataset[Any]):
    """Batches that come one by one, and not before the model has read nearly all that came.

    Args:
        batches: of which it is made.
        first: a module that runs once a forward.
    """

    def __init__(self, batches: list[Any], first: nn.Module) -> None:
        self.batches = batches
        self.forwards = self.drawn = 0
        first.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.drawn += 1
            assert self.drawn - self.forwards <= AHEAD
            yield batch


def as_generator(stream: Stream) -> Any:
    return iter(stream)


def as_loader(stream: Stream) -> Any:
    """Its length is asked from the dataset, which has none."""
    return DataLoader(stream, batch_size=None)


def key_values(model: Any, batches: Any) -> list[Any]:
    found = bs.calibrate_key_values(model, batches)
    return [found.count, found.keys.tolist(), found.values.tolist()]


def neurons(model: Any, batches: Any) -> Any:
    return bs.find_register_neurons(model, batches, count=2).neurons


def linear(model: Any, batches: Any) -> float:
    head = evaluate.LinearHead(torch.ones(7, 2 * 32), torch.arange(7.0))
    return evaluate.linear_accuracy(model, batches, head)


def fitted(model: Any, batches: Any) -> list[list[float]]:
    head = evaluate.fit_linear_head(model, batches, iterations=3, penalty=1.0)
    return head.weight.tolist()


def nearest(model: Any, batches: Any) -> float:
    return evaluate.knn_accuracy(model, PAIRS, batches, k=3)


Verb = Callable[[Any, Any], Any]
ON_TEXT: dict[str, Verb] = {
    "calibrate": lambda model, batches: list(bs.calibrate(model, batches)),
    "detect": lambda model, batches: str(bs.detect(model, batches)),
    "calibrate_key_values": key_values,
    "perplexity": bs.perplexity,
    "diagnose": lambda model, batches: str(bs.diagnose(model, batches).sites),
}
ON_IMAGES: dict[str, Verb] = {
    "detect": lambda model, batches: str(bs.detect(model, batches)),
    "calibrate_registers": lambda model, batches: bs.calibrate_registers(
        model, batches
    ).values.tolist(),
    "find_register_neurons": neurons,
    "attention_by_role": lambda model, batches: str(bs.attention_by_role(model, batches)),
}
ON_PAIRS: dict[str, tuple[str, Verb]] = {
    "top1_accuracy": ("timm", bs.top1_accuracy),
    "knn_accuracy": ("timm", nearest),
    "linear_accuracy": ("timm", linear),
    "fit_linear_head": ("timm", fitted),
}
both_ways = pytest.mark.parametrize("way", [as_generator, as_loader])


def check(verb: Verb, way: Any, make: Any, block: Any, batches: list[Any]) -> None:
    model = make()
    stream = Stream(batches, block(model))
    found = verb(model, way(stream))
    assert stream.drawn == len(batches)
    assert found == verb(make(), batches)


@both_ways
@pytest.mark.parametrize("verb", ON_TEXT)
def test_text(verb: str, way: Any) -> None:
    check(
        ON_TEXT[verb],
        way,
        lambda: models.planted("llama"),
        lambda model: models.blocks(model, "llama")[0],
        TEXTS,
    )


@both_ways
@pytest.mark.parametrize("verb", ON_IMAGES)
def test_images(verb: str, way: Any) -> None:
    check(
        ON_IMAGES[verb],
        way,
        lambda: vision.planted("timm_vit"),
        lambda model: vision.blocks(model, "timm_vit")[0],
        IMAGES,
    )


@both_ways
@pytest.mark.parametrize("verb", ON_PAIRS)
def test_labelled_images(verb: str, way: Any) -> None:
    family, of = ON_PAIRS[verb]
    check(of, way, lambda: tiny(family), lambda model: model.blocks[0], PAIRS)


def test_huggingface_datasets_shared_by_two_ranks() -> None:
    """`split_dataset_by_node` of a stream: each row is read by one of them."""
    datasets = pytest.importorskip(
        "datasets", exc_type=ImportError, reason="the installed `datasets` cannot be imported"
    )
    from datasets.distributed import split_dataset_by_node

    def rows() -> Iterator[dict[str, Any]]:
        for text in TEXTS:
            for row in text.tolist():
                yield {"input_ids": row}

    stream = datasets.IterableDataset.from_generator(rows).with_format("torch")
    parts = []
    for rank in (0, 1):
        mine = split_dataset_by_node(stream, rank=rank, world_size=2)
        parts.append(bs.calibrate(models.planted("llama"), DataLoader(mine, batch_size=4)))
    whole = bs.calibrate(models.planted("llama"), stream.batch(4))
    assert [site.count for site in parts[0] + parts[1]] == [site.count for site in whole]
    assert [site.count for site in whole] == [
        site.count for site in bs.calibrate(models.planted("llama"), TEXTS)
    ]
    assert parts[0][0].count == parts[1][0].count
    assert whole[0].count == sum(len(text) for text in TEXTS)
