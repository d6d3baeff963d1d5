"""How the attention modules of the transformers library are found, and their sizes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from biassurgery.adapters.libraries import is_of
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, EditedAttention, Shape
from biassurgery.surgery.routes import ThroughInterface, ThroughSdpa
from biassurgery.surgery.swap import host_class


def model_type(model: nn.Module) -> str:
    """`config.model_type` of a model."""
    return getattr(getattr(model, "config", None), "model_type", "")  # type: ignore[return-value]


def attention_of(model: nn.Module, block: nn.Module, config: Any) -> Attention:
    """The one attention of a block.

    Raises:
        UnsupportedModel: it has none that can be led to the core, or several.
    """
    attentions = attentions_in(block)
    if len(attentions) != 1:
        raise UnsupportedModel(
            f"model: a block of {type(model).__name__} has {len(attentions)} modules that call"
            " transformers' attention interface or sdpa, where modes on attention need one;"
            " register an adapter with attention()."
        )
    module, route = attentions[0]
    # In vision models of transformers 4 the output projection is in a sibling of the attention, and
    # their parent calls both. PEFT's adaption prompts add to what the attention returns.
    parents = (m for m in block.modules() if any(child is module for child in m.children()))
    parent = next(parents, block)
    adds = hasattr(parent, "output") or is_of(parent, "peft.tuners.adaption_prompt")
    whole = parent if parent is not block and adds else None
    return Attention(module, route, shape_of(config, module), whole)


def attentions_in(block: nn.Module) -> list[tuple[nn.Module, type[EditedAttention]]]:
    """The self-attention modules of a block whose softmax can be led to the core, and the way."""
    routes = [
        (module, _route(module))
        for name, module in block.named_modules()
        if "cross" not in name and "encoder" not in name
    ]
    return [(module, route) for module, route in routes if route is not None]


def shape_of(config: Any, attention: nn.Module) -> Shape:
    """Heads and head sizes of an attention module, from what it or the config says."""
    heads = config.num_attention_heads

    def first(names: tuple[str, ...], default: int) -> int:
        values = (getattr(holder, name, None) for name in names for holder in (attention, config))
        return next((value for value in values if isinstance(value, int)), default)

    key = first(("qk_head_dim", "head_dim"), config.hidden_size // heads)
    groups = getattr(attention, "num_key_value_groups", None)
    kv_heads = first(("num_key_value_heads",), heads)
    if isinstance(groups, int):
        kv_heads = heads // groups
    return Shape(heads, kv_heads, key, first(("v_head_dim",), key), config.hidden_size)


def _route(module: nn.Module) -> type[EditedAttention] | None:
    """The way to the core, by what the module's forward names.

    A function looked up by the name in `module.config`, or sdpa itself.
    """
    code = getattr(inspect.unwrap(host_class(module).forward), "__code__", None)
    names = set() if code is None else set(code.co_names)
    if hasattr(module, "config") and {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= names:
        return ThroughInterface
    return ThroughSdpa if "scaled_dot_product_attention" in names else None
