"""k-NN, heads and texts by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WORDS = (
    "cat",
    "dog",
    "horse",
    "ship",
    "frog",
    "truck",
    "owl",
    "a",
    "photo",
    "of",
    "the",
    "drawing",
)


@torch.no_grad()
def by_hand_knn(
    train: Tensor, labels: list[int], test: Tensor, k: int, temperature: float
) -> list[int]:
    """Votes one image and one neighbour at a time, in float64."""
    said = []
    for image in test.double().tolist():
        likeness = []
        for other, label in zip(train.double().tolist(), labels):
            product = sum(a * b for a, b in zip(image, other))
            lengths = math.sqrt(sum(a * a for a in image)) * math.sqrt(sum(b * b for b in other))
            likeness.append((product / lengths, label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(likeness, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        first, second, *_ = sorted([*votes.values(), 0.0], reverse=True)
        assert first - second > 1e-5 * first
        said.append(max(votes, key=lambda label: votes[label]))
    return said


def as_points(_: Any, pixels: Tensor) -> Tensor:
    return pixels[:, 0, 0, :2]


def word_tokenizer() -> Any:
    """A tokenizer of transformers that knows a few words and ends texts as CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel(
            {**{word: 5 + at for at, word in enumerate(WORDS)}, "?": 1, "<end>": 49_407}, "?"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 49_407)]
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", unk_token="?")
