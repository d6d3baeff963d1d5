"""The fallback: decoders of transformers that nobody has described, by their structure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from biassurgery.adapters.base import Positions
from biassurgery.adapters.image_tower import is_dual, stacks_in
from biassurgery.adapters.interface import attentions_in
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_text import TransformersDecoder, text_config
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.swap import host_class


@register_adapter
class AnyDecoder(TransformersDecoder):
    """The fallback: any text model with one list of as many blocks as its config has layers."""

    family = "any transformers decoder"
    uniform = False

    def matches(self, model: nn.Module) -> bool:
        if (
            not is_transformers(model)
            or not is_text(model)
            or (is_dual(model) and stacks_in(model))
        ):
            return False
        kind = text_config(model).model_type
        return kind in UNREADABLE or kind in SHARED or bool(_block_lists(model))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        kind = type(model).__name__
        reason = UNREADABLE.get(text_config(model).model_type)
        if reason is not None:
            raise UnsupportedModel(
                f"model: {kind} has no residual stream (B, T, D) to operate on: {reason}."
            )
        lists = _block_lists(model)
        if not lists:
            raise UnsupportedModel(f"model: {kind} {SHARED[text_config(model).model_type]}.")
        if is_dual(model):
            raise UnsupportedModel(
                f"model: {kind} has a tower of images and one of text, and no adapter knows them;"
                " pass the text tower alone, or register adapters that say where the towers are."
            )
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
        streams = (getattr(config, field) for field in STREAMS if hasattr(config, field))
        return width * next(streams, 1)

    def layout(self, model: nn.Module) -> str:
        config = text_config(model)
        if config.model_type in TOKENS_FIRST:
            return "TBD"
        return next((layout for field, layout in STREAMS.items() if hasattr(config, field)), "BTD")

    def causal(self, model: nn.Module) -> bool:
        attentions = attentions_in(self.blocks(model)[0])
        if not attentions:
            return not _fills_gaps(text_config(model).model_type)
        return all(
            # Masks make those causal that say no more than that they are in a decoder.
            getattr(module, "is_decoder", False)
            or getattr(module, "is_causal", not hasattr(module, "is_decoder"))
            for module, _ in attentions
        )

    def recurrent(self, model: nn.Module) -> bool:
        kinds = _kinds(text_config(model))
        return getattr(model, "_is_stateful", False) or any(
            not kind.endswith("attention") or "linear" in kind for kind in kinds
        )

    def attends(self, model: nn.Module, block: nn.Module) -> bool:
        return bool(attentions_in(block))

    def only_with_images(self, model: nn.Module) -> tuple[int, ...]:
        config = text_config(model)
        crossing = getattr(config, "cross_attention_layers", None) or ()
        return tuple(layer for layer in crossing if layer < config.num_hidden_layers)

    def rotates(self, model: nn.Module) -> bool:
        if any("compressed" in kind for kind in _kinds(text_config(model))):
            return False  # positions also say which tokens become one key
        if super().rotates(model):
            return True
        # Some attentions turn queries and keys themselves. Recurrent layers read positions, too.
        return not self.recurrent(model) and any(
            "position_ids" in inspect.signature(host_class(module).forward).parameters
            for block in self.blocks(model)
            for module, _ in attentions_in(block)
        )

    def positions(self, model: nn.Module) -> Positions:
        blocks = self.blocks(model)
        # The innermost model around the blocks: a tower of images may have rotations of its own.
        decoder = [
            module
            for module in model.modules()
            if is_transformers(module) and any(part is blocks[0] for part in module.modules())
        ][-1]
        others = [
            *blocks,
            *(m for m in decoder.modules() if is_transformers(m) and m is not decoder),
        ]
        inner = {id(module) for other in others for module in other.modules()}
        own = {n: module for n, module in decoder.named_modules() if id(module) not in inner}
        rotary = [module for module in own.values() if _is_rotary(module)]
        tables = [name for name, module in own.items() if isinstance(module, nn.Embedding)]
        learned = [name for name in tables if "pos" in name.rpartition(".")[2]]
        if not rotary or learned:
            raise UnsupportedModel(
                f"model: {type(model).__name__} embeds positions in a way that is not known"
                f" ({len(rotary)} rotary, learned: {learned or 'none'}); transplant needs an"
                " adapter with positions()."
            )
        return [(module, self.position_argument) for module in rotary]

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        # All of it, for what a model of unknown structure does before its body is not known.
        self.run_module(model, batch)


# The first of these that a config has counts the blocks.
DEPTHS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")
# What counts parallel streams (hyper-connections, AltUp), and the layout of those.
STREAMS = {"hc_mult": "BTSD", "hc_count": "BTD", "altup_num_inputs": "SBTD"}
TOKENS_FIRST = ("mega", "xlnet")

# Whose layers share a block, and what unties them.
SHARED = {
    "albert": (
        "runs one block as several layers, so that a single layer cannot be measured or changed;"
        " give its encoder as many copies of albert_layer_groups[0] (copy.deepcopy) as"
        " config.num_hidden_layers, and set config.num_hidden_groups to that number: it computes"
        " the same"
    ),
}
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


def _kinds(config: Any) -> set[str]:
    """The kinds of layers that a config names."""
    return {
        str(kind)
        for name in ("layer_types", "block_types", "layers_block_type")
        for kind in getattr(config, name, None) or ()
    }


def _fills_gaps(kind: str) -> bool:
    """Whether transformers has models of a type for masked tokens, and none that writes text."""
    from transformers.models.auto import modeling_auto as auto

    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module makes rotations out of `forward(x, position_ids)`."""
    names = list(inspect.signature(host_class(module).forward).parameters)
    return names[2:3] == ["position_ids"] and (
        any(name.endswith("inv_freq") for name in module._buffers)
        or "Rotary" in host_class(module).__name__  # with a table instead
    )


def is_text(model: nn.Module) -> bool:
    """Whether a model reads token ids."""
    return _token_embedding(model) is not None


def _token_embedding(model: nn.Module) -> nn.Module | None:
    """What embeds token ids; None if the model reads something else.

    A table, tables of parallel codebooks, or PEFT's wrapper of one.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    if embedding is None or not any(
        isinstance(module, nn.Embedding) for module in embedding.modules()
    ):
        return None
    return embedding


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost module lists on the path of text that have a block a layer, by name.

    The config says how many layers there are. The path of text excludes every model inside the
    model (tower, encoder) that does not hold the token embedding.
    """
    config = text_config(model)
    embedding = _token_embedding(model)
    depth = next((getattr(config, name) for name in DEPTHS if hasattr(config, name)), None)
    lists: dict[str, list[nn.Module]] = {}
    elsewhere: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in (*lists, *elsewhere)):
            continue
        is_model = name and is_transformers(module)
        if is_model and all(part is not embedding for part in module.modules()):
            elsewhere.append(name)
        elif isinstance(module, nn.ModuleList) and len(module) == depth:
            lists[name] = list(module)
    return lists
