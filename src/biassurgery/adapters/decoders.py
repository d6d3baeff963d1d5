"""The decoders of transformers of which nothing but names is to be said: one row a family.

What a table cannot say of a family is in a file of its own (`falcon`, `mpt`); a decoder in neither
is served by the fallback, which finds its blocks by their number.
"""

from __future__ import annotations

from typing import NamedTuple

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_text import TransformersDecoder


class Decoder(NamedTuple):
    """One family; paths are from the base model.

    Attributes:
        family: the name in messages and in the support table.
        model_types: the `config.model_type` values that it serves.
        blocks: where the block list is.
        positions: where positions are embedded.
        argument: the name and the place of the positions in the forward of that.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    positions: str = "rotary_emb"
    argument: tuple[str, int] = ("position_ids", 1)


DECODERS = (
    Decoder("gpt2", ("gpt2",), "h", "wpe", ("input", 0)),
    Decoder("gpt_neox", ("gpt_neox",), "layers"),
    Decoder("llama", ("llama",), "layers"),
    Decoder("mistral", ("mistral",), "layers"),
    Decoder("mixtral", ("mixtral",), "layers"),
    Decoder("opt", ("opt",), "decoder.layers", "decoder.embed_positions", ("position_ids", 2)),
    Decoder("phi", ("phi",), "layers"),
)

for row in DECODERS:
    attributes = {
        "__module__": __name__,
        "family": row.family,
        "model_types": row.model_types,
        "block_path": row.blocks,
        "position_path": row.positions,
        "position_argument": row.argument,
    }
    register_adapter(type(row.family, (TransformersDecoder,), attributes))
