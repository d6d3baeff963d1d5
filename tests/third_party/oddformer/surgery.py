"""What biassurgery must know about an Oddformer; found by the entry point in pyproject.toml."""

from torch import nn

from biassurgery.extend import TextAdapter
from oddformer import WIDTH, Oddformer


class OddformerAdapter(TextAdapter):
    family = "oddformer"
    ids = "words"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Oddformer)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.stack.values())

    def width(self, model: nn.Module) -> int:
        return WIDTH
