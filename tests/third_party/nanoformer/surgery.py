"""What biassurgery must know about a Nanoformer; found by the entry point in pyproject.toml."""

from biassurgery.extend import Attention, Shape, TextAdapter, ThroughSdpa
from nanoformer import Nanoformer


class NanoformerAdapter(TextAdapter):
    family, ids = "nanoformer", "idx"

    def matches(self, model):
        return isinstance(model, Nanoformer)

    def blocks(self, model):
        return list(model.h)

    def width(self, model):
        return model.config.width

    def vocabulary(self, model):
        return model.config.vocabulary

    def positions(self, model):
        return [(model.wpe, ("input", 0))]

    def attention(self, model, block):
        heads, width = model.config.heads, model.config.width
        shape = Shape(heads, heads, width // heads, width // heads, width)
        return Attention(block.attn, ThroughSdpa, shape)
