"""Decoders of the transformers library: the base class of every declarative text adapter, and the
structural fallback.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.arguments import forward_arguments
from biassurgery.adapters.base import TextAdapter
from biassurgery.adapters.interface import attention_of, attentions_in, is_transformers, model_type
from biassurgery.adapters.registry import register_adapter
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention
from biassurgery.surgery.swap import host_class


class TransformersDecoder(TextAdapter):
    """A causal language model of transformers, with or without its head.

    Attributes:
        model_types: the `config.model_type` values that it serves.
        path: where the block list is, from the base model.
        positions: where the embedding of positions is, from the base model.
        position_argument: the name and the place of the positions in its forward.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    path: ClassVar[str]
    positions: ClassVar[str] = "rotary_emb"
    position_argument: ClassVar[tuple[str, int]] = ("position_ids", 1)

    def matches(self, model: nn.Module) -> bool:
        return is_transformers(model) and model_type(model) in self.model_types

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(body(model).get_submodule(self.path).children())

    def width(self, model: nn.Module) -> int:
        return text_config(model).hidden_size

    def architecture(self, model: nn.Module) -> str:
        return model_type(model)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return attention_of(model, block, text_config(model))

    def position_modules(self, model: nn.Module) -> list[tuple[nn.Module, tuple[str, int]]]:
        return [(body(model).get_submodule(self.positions), self.position_argument)]

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        # A root with an accelerate hook moves data between devices: then the head is run along.
        _forward(model if hasattr(model, "_hf_hook") else body(model), batch)


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One forward without cache and loss, and with the head, if any, on the last token only where
    the model can do that.
    """
    arguments = forward_arguments(model, batch)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments.setdefault("logits_to_keep", 1)
    model(**arguments)


def body(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, "base_model", model)


def text_config(model: nn.Module) -> Any:
    """The config of the decoder, also where it is nested in that of a larger model.

    Raises:
        UnsupportedModel: transformers finds several.
    """
    try:
        return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    except ValueError as error:
        raise UnsupportedModel(
            f"model: {type(model).__name__} has several text configs ({error}); pass the decoder"
            " alone."
        ) from error


@register_adapter
class AnyDecoder(TransformersDecoder):
    """The fallback: any transformers model of text whose decoder has one list of as many blocks as
    its config says it has layers.
    """

    family = "any transformers decoder"

    def matches(self, model: nn.Module) -> bool:
        if not is_transformers(model) or _token_embedding(model) is None:
            return False
        config: Any = model.config
        return (
            config.is_encoder_decoder
            or text_config(model).model_type in UNREADABLE
            or bool(_block_lists(model))
        )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        kind = type(model).__name__
        reason = UNREADABLE.get(text_config(model).model_type)
        if reason is not None:
            raise UnsupportedModel(
                f"model: {kind} has no residual stream (B, T, D) to operate on: {reason}."
            )
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise UnsupportedModel(
                f"model: {kind} is an encoder and a decoder, which read different tokens; pass the"
                " decoder alone (the CausalLM class of its type)."
            )
        if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
            raise UnsupportedModel(
                f"model: {kind} has a tower of images and one of text, and no adapter knows them;"
                " pass the text tower alone, or register adapters that say where the towers are."
            )
        lists = _block_lists(model)
        if len(lists) > 1:
            raise UnsupportedModel(
                f"model: {kind} has several block lists ({', '.join(lists)}); register an adapter"
                " that says which of them is the decoder's."
            )
        return next(iter(lists.values()))

    def width(self, model: nn.Module) -> int:
        config = text_config(model)
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise UnsupportedModel(
                f"model: the config of {type(model).__name__} has hidden_size {width!r}, so the"
                " width of its residual stream is not known; register an adapter that says it."
            )
        return width * next(
            (getattr(config, field) for field in STREAMS if hasattr(config, field)), 1
        )

    def layout(self, model: nn.Module) -> str:
        config = text_config(model)
        if config.model_type in TOKENS_FIRST:
            return "TBD"
        return next((layout for field, layout in STREAMS.items() if hasattr(config, field)), "BTD")

    def causal(self, model: nn.Module) -> bool:
        found = attentions_in(self.blocks(model)[0])
        return all(
            getattr(module, "is_causal", getattr(module, "is_decoder", True)) for module, _ in found
        )

    def counts_cached_tokens(self, model: nn.Module) -> bool:
        config: Any = text_config(model)
        kinds = {
            str(kind)
            for name in ("layer_types", "block_types", "layers_block_type")
            for kind in getattr(config, name, None) or ()
        }
        return not getattr(model, "_is_stateful", False) and all(
            kind.endswith("attention") and "linear" not in kind for kind in kinds
        )

    def attends(self, model: nn.Module, block: nn.Module) -> bool:
        return bool(attentions_in(block))

    def position_modules(self, model: nn.Module) -> list[tuple[nn.Module, tuple[str, int]]]:
        blocks = self.blocks(model)
        decoder = [
            module
            for module in model.modules()
            if is_transformers(module) and any(m is blocks[0] for m in module.modules())
        ][-1]
        inner = {id(module) for block in blocks for module in block.modules()}
        rotary = [
            module for module in decoder.modules() if id(module) not in inner and _is_rotary(module)
        ]
        tables = [
            name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)
        ]
        learned = [name for name in tables if "pos" in name.rpartition(".")[2]]
        if not rotary or learned:
            raise UnsupportedModel(
                f"model: {type(model).__name__} embeds positions in a way that is not known"
                f" ({len(rotary)} rotary, learned: {learned or 'none'}); transplant needs an"
                " adapter with position_modules()."
            )
        return [(module, self.position_argument) for module in rotary]

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        _forward(
            model, batch
        )  # all of it, for what a model of unknown structure does before its body is not known


DEPTHS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_layers",
    "num_hidden_layers",
)  # the first that a config has counts the blocks
STREAMS = {
    "hc_mult": "BTSD",
    "hc_count": "BTD",
    "altup_num_inputs": "SBTD",
}  # what counts parallel streams: hyper-connections, AltUp
TOKENS_FIRST = ("mega", "xlnet")

UNREADABLE = {
    "blt": "bytes and patches of bytes pass through stacks of blocks of their own",
    "cpmant": "prompt tokens that the model adds stand in front of the text",
    "dory": "the blocks in the middle run several times in one forward",
    "hrm_text": "two stacks of blocks run in turn, several times in one forward",
    "inkling2_loop": "the blocks in the middle run several times in one forward",
    "inkling2_loop_text": "the blocks in the middle run several times in one forward",
    "prophetnet": "blocks return the main stream and the n-gram streams one after the other",
    "reformer": "reversible blocks return two streams, and the model ends in both",
    "xlm": "there are no blocks, only lists of attentions, feed-forward layers and norms",
    "xlm-prophetnet": "blocks return the main stream and the n-gram streams one after the other",
}


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module makes rotations out of `forward(x, position_ids)`."""
    names = list(inspect.signature(host_class(module).forward).parameters)
    return names[2:3] == ["position_ids"] and any(
        name.endswith("inv_freq") for name in module._buffers
    )


def _token_embedding(model: nn.Module) -> nn.Module | None:
    """What embeds token ids (a table, tables of parallel codebooks, PEFT's wrapper of one); None if
    the model reads something else.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return (
        found
        if found is not None and any(isinstance(module, nn.Embedding) for module in found.modules())
        else None
    )


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost module lists on the path of text that are as long as the config's number of
    layers, by name.

    The path of text excludes every model inside the model (tower, encoder) that does not hold the
    token embedding.
    """
    config = text_config(model)
    embedding = _token_embedding(model)
    depth = next((getattr(config, name) for name in DEPTHS if hasattr(config, name)), None)
    found: dict[str, list[nn.Module]] = {}
    elsewhere: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in (*found, *elsewhere)):
            continue
        if (
            name
            and is_transformers(module)
            and all(inner is not embedding for inner in module.modules())
        ):
            elsewhere.append(name)
        elif isinstance(module, nn.ModuleList) and len(module) == depth:
            found[name] = list(module)
    return found
