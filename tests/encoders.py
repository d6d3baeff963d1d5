"""Tiny random encoders of text with massive activations planted in their weights.

See tests/models.py for what is planted. Here a block may end in a LayerNorm, behind which all that
a token has is of one size: there the massive channel is one that this norm weights, as in BERT.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import (
    CHANNEL,
    DELIMITER,
    DELIMITER_ID,
    HEADS,
    HIDDEN,
    KEYS,
    LAYER,
    LAYERS,
    PAD_ID,
    START,
    START_ID,
    VOCAB,
    clear,
    grow,
    tokens,
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "pad_token_id": PAD_ID,
    "bos_token_id": START_ID,
    "eos_token_id": DELIMITER_ID,
    "initializer_range": 0.08,
}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LEARNED = _SIZES | _DROPOUT | {"max_position_embeddings": 256}
_SHIFTED = _LEARNED | {"max_position_embeddings": 256 + PAD_ID + 1}  # counted from the padding id
_DISTIL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": 128,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.08,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_MODERN = _SIZES | {"cls_token_id": START_ID, "sep_token_id": DELIMITER_ID, "local_attention": 16}
_BERT = ("attention.output.dense", "output.dense")


@dataclass(frozen=True)
class Encoder:
    """One family.

    Attributes:
        model: its class, in transformers.
        options: of its config.
        blocks: where the layers are.
        attention: where the attention is, in a block.
        writers: what writes to the residual stream in a block, of the attention and of the MLP.
        reader: what reads it in the MLP.
        norm: the LayerNorm at the end of a block; None: the stream runs through.
        middle: the one between attention and MLP.
    """

    model: str
    options: dict[str, Any]
    blocks: str
    attention: str = "attention.self"
    writers: tuple[str, str] = _BERT
    reader: str = "intermediate.dense"
    norm: str | None = "output.LayerNorm"
    middle: str = "attention.output.LayerNorm"

    def build(self) -> Any:
        import transformers

        kind = getattr(transformers, self.model)
        return kind(kind.config_class(**self.options)).eval()


ENCODERS = {
    "bert": Encoder("BertForMaskedLM", _LEARNED, "bert.encoder.layer"),
    "roberta": Encoder("RobertaForMaskedLM", _SHIFTED, "roberta.encoder.layer"),
    "xlm_roberta": Encoder("XLMRobertaForMaskedLM", _SHIFTED, "roberta.encoder.layer"),
    "electra": Encoder(
        "ElectraForMaskedLM", _LEARNED | {"embedding_size": HIDDEN}, "electra.encoder.layer"
    ),
    "distilbert": Encoder(
        "DistilBertForMaskedLM",
        _DISTIL,
        "distilbert.transformer.layer",
        "attention",
        ("attention.out_lin", "ffn.lin2"),
        "ffn.lin1",
        "output_layer_norm",
        "sa_layer_norm",
    ),
    "modernbert": Encoder(
        "ModernBertForMaskedLM",
        _MODERN,
        "model.layers",
        "attn",
        ("attn.Wo", "mlp.Wo"),
        "mlp.Wi",
        None,
    ),
}
FAMILIES = tuple(ENCODERS)
BEHIND = 120.0  # the same of the blocks behind
FLAG = 2  # the neuron there
GAIN = 1200.0  # at most sqrt(HIDDEN - 1) times that comes out of a norm
QUIET = 0.001  # how much less an attention reads of it, for no norm is in front of queries and keys


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    """The layers of a planted model, found without the library under test."""
    return list(model.get_submodule(ENCODERS[family].blocks).children())


def attentions(model: nn.Module, family: str) -> list[tuple[nn.Module, nn.Module]]:
    """The attention of every layer with its output projection."""
    row = ENCODERS[family]
    return [
        (block.get_submodule(row.attention), block.get_submodule(row.writers[0]))
        for block in blocks(model, family)
    ]


def planted(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A planted masked language model in eval mode; a new object each time."""
    return copy.deepcopy(_planted(family)).to(dtype)


@cache
@torch.no_grad()
def _planted(family: str) -> Any:
    row = ENCODERS[family]
    torch.manual_seed(0)
    model = row.build()
    layers = blocks(model, family)
    table = model.get_input_embeddings().weight
    inside = {id(p) for block in layers for p in block.parameters()}
    tables = [p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in inside]
    for source in tables:
        if source.shape[-1] == HIDDEN:
            clear(source, *KEYS.values(), CHANNEL)
    for block in layers:
        for path in row.writers:
            writer: Any = block.get_submodule(path)
            clear(writer.weight.T, *KEYS.values(), CHANNEL)
            if writer.bias is not None:
                clear(writer.bias[None], *KEYS.values(), CHANNEL)
    for token, key in KEYS.items():
        table[token] = 0.0
        table[token, key] = 4.0
    block = layers[LAYER]
    reader: Any = block.get_submodule(row.reader)
    writer = block.get_submodule(row.writers[1])
    at = ((tokens(1), 0, START_ID, START), (tokens(4), 9, DELIMITER_ID, DELIMITER))
    if row.norm is None:
        half = len(reader.weight) // 2  # of a gated MLP: what is read, and the gate
        for batch, position, token, level in at:
            readers = [reader.weight[:half], reader.weight[half:]]
            grow(
                model,
                block,
                readers,
                [writer.weight],
                batch,
                torch.tensor([position]),
                token,
                level,
            )
        return model
    _grow_behind_norms(model, row, layers, reader, writer)
    return model


def _grow_behind_norms(
    model: nn.Module, row: Encoder, layers: list[nn.Module], reader: Any, writer: Any
) -> None:
    """As `grow`, where what is written goes through a LayerNorm, to which level is not linear.

    Its weight of `CHANNEL` is `GAIN`, and `BEHIND` in the blocks behind, where the value stays
    massive.
    """
    assert row.norm is not None
    for block in layers[LAYER:]:
        norm: Any = block.get_submodule(row.norm)
        norm.weight[CHANNEL] = GAIN if block is layers[LAYER] else BEHIND
        if block is not layers[LAYER]:
            _hand_on(block, row)
        output = block.get_submodule(row.writers[0])
        for part in block.get_submodule(row.attention).modules():
            if isinstance(part, nn.Linear) and part is not output:
                part.weight[:, CHANNEL] *= QUIET
    for token, key in KEYS.items():
        reader.weight[token] = 0.0
        reader.weight[token, key] = 1.0
        writer.weight[:, token] = 0.0
    for batch, position, token, level in (
        (tokens(1), 0, START_ID, START),
        (tokens(4), 9, DELIMITER_ID, DELIMITER),
    ):

        def measure(weight: float) -> float:
            writer.weight[CHANNEL, token] = weight  # noqa: B023 called here
            return _seen(model, layers[LAYER], batch)[:, position, CHANNEL].mean().item()  # noqa: B023

        low, high = 0.0, 1e4
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if measure(middle) < level else (low, middle)
        assert abs(measure(low) / level - 1) < 1e-3


def _hand_on(block: nn.Module, row: Encoder) -> None:
    """Let the value be massive behind another block: where it is, it is all that a norm leaves.

    One neuron that is off elsewhere makes it anew. Handed on by norms alone, what rounding leaves
    at other tokens would grow as it does, block by block.
    """
    before: Any = block.get_submodule(row.middle)
    reader: Any = block.get_submodule(row.reader)
    writer: Any = block.get_submodule(row.writers[1])
    before.weight[CHANNEL] = 1 / BEHIND
    reader.weight[FLAG] = 0.0
    reader.weight[FLAG, CHANNEL] = 12 * BEHIND / HIDDEN**0.5
    reader.bias[FLAG] = -6.0
    writer.weight[:, FLAG] = 0.0
    writer.weight[CHANNEL, FLAG] = 3.0


def _seen(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = block.register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    model(batch)
    hook.remove()
    return seen[0].double()
