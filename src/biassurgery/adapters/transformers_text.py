"""Text models of the transformers library: the base classes of their adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from biassurgery.adapters.arguments import parameters_of, takes_anything
from biassurgery.adapters.base import Adapter, Positions
from biassurgery.adapters.interface import attention_of, model_type
from biassurgery.adapters.libraries import is_fsdp, is_transformers
from biassurgery.adapters.text import TextAdapter
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention
from biassurgery.surgery.swap import host_class

# What builds masks of a cache's own size.
MASKS = {
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_masks_for_generate",
}


class TransformersText(TextAdapter):
    """A text model of transformers, with or without its head.

    Attributes:
        model_types: the `config.model_type` values that it serves.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def matches(self, model: nn.Module) -> bool:
        return is_transformers(model) and model_type(model) in self.model_types

    def body(self, model: nn.Module) -> nn.Module:
        return getattr(model, "base_model", model)

    def reserved(self, model: nn.Module) -> set[int]:
        return set(_token_ids(model.config.to_dict()))  # type: ignore[union-attr, operator]

    def logits(self, model: nn.Module, output: Any) -> Tensor:
        """As in `Adapter`; a tuple (`return_dict=False`) is refused.

        It does not tell whether it begins with logits or, from a model without a head, with hidden
        states.
        """
        return Adapter.logits(self, model, output)


class TransformersDecoder(TransformersText):
    """A causal language model of transformers, with or without its head.

    Attributes:
        block_path: where the block list is, from the base model.
        position_path: where the embedding of positions is, from the base model.
        position_argument: the name and the place of the positions in its forward.
        own_mask: whether a mask that it builds by itself is right for single tokens behind a cache
            that has evicted some, as long as nothing is padded.
    """

    block_path: ClassVar[str]
    position_path: ClassVar[str] = "rotary_emb"
    position_argument: ClassVar[tuple[str, int]] = ("position_ids", 1)
    own_mask: ClassVar[bool] = False
    uniform = True
    remembered = ("rope_deltas",)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(self.body(model).get_submodule(self.block_path).children())

    def width(self, model: nn.Module) -> int:
        return text_config(model).hidden_size

    def architecture(self, model: nn.Module) -> str:
        return model_type(model)

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As in `TextAdapter`; positions begin at the first real token where padding comes first.

        Models with learned positions would otherwise read a left-padded sequence at positions that
        it never has by itself. Models of images and text make positions of their own, which these
        would replace.
        """
        arguments = super().inputs(model, batch)
        parameters = parameters_of(model)
        if "use_cache" in parameters or takes_anything(parameters):
            arguments.setdefault("use_cache", shares_by_cache(model))
        mask = batch.get("attention_mask")
        if (
            "position_ids" in parameters
            and "position_ids" not in batch
            and isinstance(mask, Tensor)
            and not mask[:, 0].all()
            and not self.nested(model)
        ):
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return arguments

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        # A root with an accelerate hook moves data between devices, and one of FSDP2 gathers the
        # parameters that no block holds: then the head is run along.
        whole = hasattr(model, "_hf_hook") or is_fsdp(model)
        self.run_module(model if whole else self.body(model), batch)

    def run_module(self, module: nn.Module, batch: Mapping[str, Any]) -> None:
        """One forward of the model or its body.

        The head, if any, runs on the last token only where it can do that.
        """
        arguments = self.inputs(module, batch)
        if "logits_to_keep" in parameters_of(module):
            arguments.setdefault("logits_to_keep", 1)
        module(**arguments)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return attention_of(model, block, text_config(model))

    def attention_limits(self, model: nn.Module) -> dict[str, int]:
        config = text_config(model)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        slides = getattr(config, "use_sliding_window", True) and any(
            "sliding" in kind for kind in kinds
        )
        limits = {
            "sliding_window": getattr(config, "sliding_window", None) if slides else None,
            "attention_chunk_size": self.attention_chunk(model),
            "max_seq_len": getattr(config, "max_seq_len", None),
        }
        return {name: limit for name, limit in limits.items() if limit}

    def attention_chunk(self, model: nn.Module) -> int | None:
        return getattr(text_config(model), "attention_chunk_size", None)

    def positions(self, model: nn.Module) -> Positions:
        return [(self.body(model).get_submodule(self.position_path), self.position_argument)]

    def nested(self, model: nn.Module) -> bool:
        return text_config(model).model_type != model_type(model)

    def position_makers(self, model: nn.Module) -> list[nn.Module]:
        block = self.blocks(model)[0]
        return [
            module
            for module in model.modules()
            if is_transformers(module)
            and "position_ids" in parameters_of(module)
            and any(part is block for part in module.modules())
        ]

    def context(self, model: nn.Module) -> int | None:
        config = text_config(model)
        names = ("max_position_embeddings", "max_seq_len")
        return next((size for name in names if (size := getattr(config, name, None))), None)

    def learned_positions(self, model: nn.Module) -> bool:
        """Whether a table beside that of the tokens is as long as the context.

        Some make it a few rows longer.
        """
        context = self.context(model)
        tokens = model.get_input_embeddings()  # type: ignore[operator]
        return context is not None and any(
            isinstance(module, nn.Embedding)
            and module is not tokens
            and context <= module.num_embeddings <= context + 2
            for module in model.modules()
        )

    def cache_arguments(self, model: nn.Module, cache: Any) -> dict[str, Any]:
        # The name changed in transformers 5.24.
        name = "cache" if "cache" in parameters_of(model) else "past_key_values"
        return {name: cache, "use_cache": True}

    def check_eviction(self, model: nn.Module, padded: bool) -> None:
        kind = type(model).__name__
        forward = inspect.unwrap(host_class(self.body(model)).forward)
        called = set(forward.__code__.co_names)
        if "build_alibi_tensor" in called and getattr(text_config(model), "alibi", True):
            raise UnsupportedModel(
                f"model: {kind} builds its ALiBi for the whole sequence, not for what is cached;"
                " use a model with rotary positions."
            )
        if not called & MASKS and (padded or not self.own_mask):
            raise UnsupportedModel(
                f"model: the mask of {kind}{' for rows with padding' if padded else ''} does not"
                " have the size of the cache in this version of transformers; use a newer"
                " transformers, or another model."
            )


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


def shares_by_cache(model: nn.Module) -> bool:
    """Whether the last layers find the keys of earlier ones in a cache, and make others without.

    So it is with Gemma 3n before transformers 5, which without a cache is another model.
    """
    if not getattr(text_config(model), "num_kv_shared_layers", 0):
        return False
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def _token_ids(config: Mapping[str, Any]) -> Iterator[int]:
    """The token ids that a config names, those of its parts included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif "token" in str(name):
            ids = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in ids if isinstance(item, int))
