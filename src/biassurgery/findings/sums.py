"""Sums by name, which two measurements of different data can add up."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor


class Sums(dict[Hashable, Any]):
    """Numbers and tensors by key; tensors are kept on the CPU."""

    def add(self, key: Hashable, amount: Tensor | float) -> None:
        """Add to what stands under a key, which is 0 as long as there is nothing."""
        amount = amount.cpu() if isinstance(amount, Tensor) else amount
        self[key] = self[key] + amount if key in self else amount

    def state(self) -> Sums:
        """All of it, for a checkpoint."""
        return self

    def restore(self, state: Mapping[Hashable, Any]) -> None:
        """Hold what a checkpoint held, for all who share this object."""
        self.clear()
        self.update(state)

    def __add__(self, other: Sums) -> Sums:
        total = Sums(self)
        for key, amount in other.items():
            total.add(key, amount)
        return total
