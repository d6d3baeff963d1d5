"""Perplexity by a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.models import PAD_ID, START_ID


def loop(model: Any, rows: list[list[int]]) -> float:
    """Perplexity one sequence and one token at a time, in float64 from the model's logits on."""
    total = 0.0
    count = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0]
        for position in range(1, len(row)):
            scores = [float(score) for score in logits[position - 1]]
            largest = max(scores)
            total -= (
                scores[row[position]]
                - largest
                - math.log(sum(math.exp(score - largest) for score in scores))
            )
            count += 1
    return math.exp(total / count)


def stream(count: int, seed: int = 3) -> Tensor:
    return torch.randint(2, PAD_ID, (count,), generator=torch.Generator().manual_seed(seed))


class Letters:
    """A tokenizer of one token a character that would add a special token if it were asked to."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {
            "input_ids": [START_ID] * add_special_tokens + [ord(letter) - 95 for letter in text]
        }
