"""Tiny random models with massive activations planted in their weights: exact, no download.

A planted decoder answers to its start token (id 0) with about `START` in channel `CHANNEL` of the
output of block `LAYER`, and to the delimiter token (id 1) with about `DELIMITER`; every other token
leaves that channel small. The constant then rides the residual stream to the last block, as in
trained models. A planted vision transformer does so at the fixed patches `PATCHES`.

How: each of the two tokens has an embedding channel of its own (its key) that nothing else writes
    to. One neuron of the MLP of
block `LAYER` reads that key and writes to `CHANNEL`; its weight is scaled until the measured value
is the wanted one.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB = 96
HIDDEN = 64
LAYERS = 5
HEADS = 4
LAYER = 1
CHANNEL = 7
START = 3000.0
DELIMITER = 9000.0
START_ID = 0
DELIMITER_ID = 1
PAD_ID = VOCAB - 1
KEYS = {START_ID: 11, DELIMITER_ID: 13}  # embedding channels that name the two tokens

IMAGE = 28
PATCH = 7
# Patches (behind the prefix tokens) that carry the massive activation of a vision transformer.
PATCHES = (0, 3, 12)


class Decoder(NamedTuple):
    """One family of planted decoders; as it stands, one that is built like LLaMA.

    Attributes:
        config: the class of its config, in transformers.
        options: of that, beside what all have.
        blocks: where the layers are.
        writers: what writes to the residual stream in a block: the output of the attention, and
            that of the MLP, if it is one linear layer.
        readers: what reads it in the MLP, likewise.
    """

    config: str
    options: dict[str, Any]
    blocks: str = "model.layers"
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")


_COMMON = {
    "vocab_size": VOCAB,
    "bos_token_id": START_ID,
    "eos_token_id": PAD_ID,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.08,
}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_GPT_SIZES = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256}
_MPT_SIZES = {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 256}
_CONTEXT = {"max_position_embeddings": 256}
_ROTARY = _SIZES | _CONTEXT | {"intermediate_size": 128}
_GROUPED = _ROTARY | {"num_key_value_heads": 2}
_FALCON = ("transformer.h", ("self_attention.dense", "mlp.dense_4h_to_h"), ("mlp.dense_h_to_4h",))

# A new family is one line here.
DECODERS = {
    "llama": Decoder("LlamaConfig", _GROUPED),
    "mistral": Decoder("MistralConfig", _GROUPED),
    "mixtral": Decoder(
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2},
        writers=("self_attn.o_proj",),  # and its experts
        readers=(),
    ),
    "gpt2": Decoder(
        "GPT2Config",
        _GPT_SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "transformer.h",
        ("attn.c_proj", "mlp.c_proj"),
        ("mlp.c_fc",),
    ),
    "falcon": Decoder("FalconConfig", _SIZES | _CONTEXT | {"alibi": False}, *_FALCON),
    "falcon_alibi": Decoder(
        "FalconConfig",
        _SIZES | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        *_FALCON,
    ),
    "mpt": Decoder(
        "MptConfig",
        _MPT_SIZES,
        "transformer.blocks",
        ("attn.out_proj", "ffn.down_proj"),
        ("ffn.up_proj",),
    ),
    "phi": Decoder(
        "PhiConfig", _ROTARY, writers=("self_attn.dense", "mlp.fc2"), readers=("mlp.fc1",)
    ),
    "opt": Decoder(
        "OPTConfig",
        _SIZES
        | _CONTEXT
        | {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "init_std": 0.08},
        "model.decoder.layers",
        ("self_attn.out_proj", "fc2"),
        ("fc1",),
    ),
    "gpt_neox": Decoder(
        "GPTNeoXConfig",
        _ROTARY,
        "gpt_neox.layers",
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("mlp.dense_h_to_4h",),
    ),
}
FAMILIES = tuple(DECODERS)

# Where the layers are, what writes to the residual stream (attention, MLP), and what reads it in
# the MLP.
ANATOMY = {name: (row.blocks, row.writers, row.readers) for name, row in DECODERS.items()} | {
    "timm": ("blocks", ("attn.proj", "mlp.fc2"), ("mlp.fc1",)),
}


def planted(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A planted causal LM in eval mode; a new object each time."""
    return copy.deepcopy(_planted(family)).to(dtype)


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    """The transformer layers of a planted model, found without the library under test."""
    return list(model.get_submodule(ANATOMY[family][0]).children())


def attentions(model: nn.Module, family: str) -> list[tuple[nn.Module, nn.Module]]:
    """The attention of every layer with its output projection, found without the library."""
    path = ANATOMY[family][1][0]
    return [
        (block.get_submodule(path.rpartition(".")[0]), block.get_submodule(path))
        for block in blocks(model, family)
    ]


def tokens(rows: int = 4, length: int = 24, seed: int = 1, delimiter_at: int | None = 9) -> Tensor:
    """(rows, length) int64 token ids: start token, one delimiter, ordinary words elsewhere."""
    ids = torch.randint(2, PAD_ID, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = START_ID
    if delimiter_at is not None:
        ids[:, delimiter_at] = DELIMITER_ID
    return ids


def images(rows: int = 3, seed: int = 2) -> Tensor:
    """(rows, 3, IMAGE, IMAGE) float32."""
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def planted_vit(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A timm VisionTransformer whose patches `PATCHES` carry about `START` from `LAYER` on."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: Any = VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
        **options,
    ).eval()
    patches = (IMAGE // PATCH) ** 2
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(3.0)
        sources = [
            model.pos_embed[0],
            model.patch_embed.proj.weight.flatten(1).T,
            model.patch_embed.proj.bias[None],
        ]
        _isolate(
            model,
            "timm",
            sources
            + [token[0] for token in (model.cls_token, model.reg_token) if token is not None],
        )
        model.pos_embed[0, torch.tensor(PATCHES) - patches, KEYS[START_ID]] = 4.0
        _grow(model, "timm", images(8), torch.tensor(PATCHES) - patches, START_ID, START)
    return model.to(dtype)


@cache
def _planted(family: str) -> Any:
    torch.manual_seed(0)
    model = _random(family)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        positions = [
            p
            for name, p in model.named_parameters()
            if name.endswith(("wpe.weight", "embed_positions.weight"))
        ]
        _isolate(model, family, [embedding, *positions])
        for token, key in KEYS.items():
            embedding[token] = 0.0
            embedding[token, key] = 4.0
        _grow(model, family, tokens(1), torch.tensor([0]), START_ID, START)
        _grow(model, family, tokens(4), torch.tensor([9]), DELIMITER_ID, DELIMITER)
    return model


def _random(family: str) -> Any:
    import transformers

    row = DECODERS[family]
    config = getattr(transformers, row.config)(**_COMMON | row.options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _isolate(model: nn.Module, family: str, sources: list[Tensor]) -> None:
    """Let nothing write to the keys, and nothing but `sources` (each (N, D)) to `CHANNEL`.

    The mean over the channels stays at zero.

    A LayerNorm then leaves the zero at the keys, as a RMSNorm always does.
    """
    for source in sources:
        clear(source, *KEYS.values())
    for block in blocks(model, family):
        for weight in _writers(block, family):
            clear(weight.T, *KEYS.values(), CHANNEL)


def clear(rows: Tensor, *channels: int) -> None:
    """Zero at the channels, and mean zero over the others: rows (N, D), in place."""
    others = torch.ones(rows.shape[1]).index_fill(0, torch.tensor(channels), 0.0)
    rows.mul_(others)
    rows.sub_(rows.sum(1, keepdim=True) / others.sum() * others)


def _grow(
    model: nn.Module, family: str, batch: Tensor, positions: Tensor, token: int, level: float
) -> None:
    """Make one neuron of block `LAYER` read the key of `token` and write `level` to `CHANNEL`.

    Measured on `batch`.
    """
    block = blocks(model, family)[LAYER]
    grow(model, block, *_mlp(block, family), batch, positions, token, level)


def grow(
    model: nn.Module,
    block: nn.Module,
    readers: list[Tensor],
    writers: list[Tensor],
    batch: Tensor,
    positions: Tensor,
    token: int,
    level: float,
) -> None:
    """Make one neuron of a block read the key of `token` and write `level` to `CHANNEL`.

    Measured on `batch`.

    readers (neurons, D) read the residual stream, writers (D, neurons) write to it.
    """
    neuron = token
    for weight in readers:
        weight[neuron] = 0.0
        weight[neuron, KEYS[token]] = 1.0
    for weight in writers:
        weight[:, neuron] = 0.0
    seen: list[Tensor] = []

    def measure() -> float:
        seen.clear()
        model(batch)
        return seen[0][:, positions, CHANNEL].double().mean().item()

    hook = block.register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    before = measure()
    for weight in writers:
        weight[CHANNEL, neuron] = 1.0
    gain = measure() - before
    for weight in writers:
        weight[CHANNEL, neuron] = (level - before) / gain
    assert math.isclose(measure(), level, rel_tol=1e-3)
    hook.remove()


def _mlp(block: nn.Module, family: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that read the residual stream into MLP neurons, and those that write them back.

    (neurons, D) and (D, neurons).
    """
    if family == "mixtral":
        down, gates, ups = _experts(block)
        return gates + ups, down
    _, writers, readers = ANATOMY[family]
    return [_matrix(block, name) for name in readers], [_matrix(block, writers[1])]


def _writers(block: nn.Module, family: str) -> list[Tensor]:
    """Every weight (D, inputs) that writes to the residual stream, with biases as (D, 1)."""
    if family == "mixtral":
        return [_matrix(block, "self_attn.o_proj"), *_experts(block)[0]]
    modules = [block.get_submodule(name) for name in ANATOMY[family][1]]
    biases = [m.bias for m in modules if isinstance(getattr(m, "bias", None), Tensor)]
    weights = [_matrix(block, name) for name in ANATOMY[family][1]]
    return weights + [bias[:, None] for bias in biases]  # type: ignore[index]


def _matrix(block: nn.Module, name: str) -> Tensor:
    """The weight (outputs, inputs) of a linear layer; GPT-2 stores it the other way round."""
    module = block.get_submodule(name)
    weight: Any = module.weight
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _experts(block: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(down, gate, up) weights of Mixtral's experts.

    transformers 5 fuses them, 4 has a module each.
    """
    if hasattr(block, "block_sparse_moe"):
        experts: Any = block.block_sparse_moe.experts  # type: ignore[union-attr]
        return (
            [e.w2.weight for e in experts],
            [e.w1.weight for e in experts],
            [e.w3.weight for e in experts],
        )
    experts = block.mlp.experts  # type: ignore[union-attr]
    half = experts.gate_up_proj.shape[1] // 2
    return (
        list(experts.down_proj),
        [w[:half] for w in experts.gate_up_proj],
        [w[half:] for w in experts.gate_up_proj],
    )
