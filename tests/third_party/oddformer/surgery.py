"""What biassurgery must know about an Oddformer; found by the entry point in pyproject.toml."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from biassurgery import TextAdapter
from oddformer import WIDTH, Oddformer


class OddformerAdapter(TextAdapter):
    family = "oddformer"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Oddformer)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.stack.values())

    def width(self, model: nn.Module) -> int:
        return WIDTH

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        model(batch["input_ids"])
