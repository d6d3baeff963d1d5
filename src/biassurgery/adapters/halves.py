"""Encoder-decoders: two stacks of blocks that read different things. One half of it is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from biassurgery.adapters.arguments import parameters_of
from biassurgery.adapters.fallback import AnyDecoder, is_text
from biassurgery.adapters.interface import attention_of, attentions_in, model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.sound import WhisperEncoder
from biassurgery.adapters.transformers_text import TransformersText
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, Shape

# Those whose halves are tested against plain hooks: one list of blocks, one stream of (B, T, D).
TYPES = (
    "bart",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "marian",
    "mbart",
    "mt5",
    "pegasus",
    "plbart",
    "t5",
    "umt5",
    "whisper",
)
HALVES = ("get_encoder", "get_decoder")


@register_adapter
class Whole(TransformersText):
    """An encoder-decoder, or a half that is not known: refused with what can be passed instead."""

    family = "encoder-decoder"

    def matches(self, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        part_of_one = is_transformers(model) and getattr(config, "is_encoder_decoder", False)
        return part_of_one and not WhisperEncoder().matches(model)

    def blocks(self, model: nn.Module) -> NoReturn:
        kind = type(model).__name__
        halves = {name: half for name in HALVES if (half := _half(model, name)) is not None}
        if not halves:
            reads = getattr(model, "main_input_name", "input_ids")
            raise UnsupportedModel(
                f"model: {kind} is one half of an encoder-decoder that reads {reads}; halves that"
                f" read token ids are served of the types {', '.join(TYPES)}, and Whisper's"
                " encoder. Register an adapter for it."
            )
        served = [f"model.{name}()" for name, half in halves.items() if _is_served(half)]
        advice = f"pass {' or '.join(served)}" if served else "register an adapter for one of them"
        what = (
            "is an encoder and a decoder, which read different things, so that a token of one is no"
            " token of the other"
            if len(halves) > 1
            else "holds one half of an encoder-decoder"
        )
        raise UnsupportedModel(
            f"model: {kind} {what}; {advice}. A patch of that acts in the whole."
        )

    def width(self, model: nn.Module) -> NoReturn:
        self.blocks(model)


@register_adapter
class Half(AnyDecoder):
    """An encoder, or a decoder without its head; it shares its modules with the whole.

    It is what `get_encoder()` or `get_decoder()` of a whole model returns.
    """

    family = "half of an encoder-decoder"

    def matches(self, model: nn.Module) -> bool:
        known = is_transformers(model) and model_type(model) in TYPES
        return known and len(_lists(model)) == 1 and is_text(model)

    def body(self, model: nn.Module) -> nn.Module:
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return _lists(model)[0]

    def width(self, model: nn.Module) -> int:
        return model.config.d_model  # type: ignore[union-attr, return-value]

    def architecture(self, model: nn.Module) -> str:
        return f"{model_type(model)}_{'decoder' if self.causal(model) else 'encoder'}"

    def causal(self, model: nn.Module) -> bool:
        # A half of T5 says so itself; both halves are of one class, with one forward.
        says: Any = getattr(model, "is_decoder", None)
        return says if isinstance(says, bool) else "encoder_hidden_states" in parameters_of(model)

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().inputs(model, batch)
        if "use_cache" not in parameters_of(model):  # an encoder has none
            arguments.pop("use_cache", None)
        return arguments

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        if hasattr(model.config, "relative_attention_num_buckets"):
            return t5_attention(model, block)
        found = attention_of(model, block, model.config)
        module: Any = found.module  # the config has the heads of both halves
        heads, size = module.num_heads, module.head_dim
        return found._replace(shape=Shape(heads, heads, size, size, self.width(model)))


def t5_attention(model: nn.Module, block: nn.Module) -> Attention:
    """The self-attention of a block of T5, mT5 or UMT5: the first of its sublayers.

    Its relative positions come to the softmax as a bias of the logits.

    Raises:
        UnsupportedModel: it computes its softmax itself, as in transformers 4.
    """
    config: Any = model.config
    sublayer = block.get_submodule("layer.0")
    if not attentions_in(sublayer):
        raise UnsupportedModel(
            f"model: the attention of {type(model).__name__} computes its softmax itself in this"
            " version of transformers, so it cannot be changed or watched; use a newer transformers"
            " (5.24 goes through the attention interface)."
        )
    shape = Shape(config.num_heads, config.num_heads, config.d_kv, config.d_kv, config.d_model)
    return attention_of(model, sublayer, config)._replace(shape=shape)


def _is_served(half: nn.Module) -> bool:
    return Half().matches(half) or WhisperEncoder().matches(half)


def _lists(model: nn.Module) -> list[list[nn.Module]]:
    """The lists of modules that a model holds itself."""
    return [list(child) for child in model.children() if isinstance(child, nn.ModuleList)]


def _half(model: Any, name: str) -> nn.Module | None:
    """What a whole model returns as one of its halves; None: it has no such half."""
    try:
        half = getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None
    return half if isinstance(half, nn.Module) and half is not model else None
