"""The ways from a host's forward to the core. None of them copies a forward.

`ThroughInterface` is for attention of transformers that looks its function up by the name in its
config: the module gets a view of the config with our name in it. The model's own config
stays, so that masks are built as before, and no other layer or model changes. `ThroughSdpa` is for
attention that calls `torch.nn.functional.scaled_dot_product_attention` itself.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.arguments import for_softmax
from biassurgery.surgery.attention import EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.interface import (
    EAGER,
    found_function,
    implementation_of,
)
from biassurgery.surgery.masks import as_mask
from biassurgery.surgery.tracing import check_not_traced

NAME = "biassurgery"
# The arguments of attention functions that the core knows.
_KNOWN = frozenset(
    (
        "scaling",
        "dropout",
        "is_causal",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_bias",
    )
)


class Renamed:
    """A config that names another attention implementation; for the rest it is the host's own.

    What is set on either is seen by both.
    """

    def __init__(self, config: Any, implementation: str) -> None:
        self.__dict__.update(_config=config, _attn_implementation=implementation)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


class WithConfig(EditedAttention):
    """Attention that reads `self.config`, where it finds another implementation than its model has.

    The module's own attribute stays as it is: a property of the class goes before it, so that the
    class swap alone decides which of the two is read.

    Attributes:
        implementation: the name that it finds.
        host_config: the module's own config.
        core_config: the same with that name in it.
    """

    implementation: ClassVar[str]
    host_config: Any
    core_config: Any
    lent = (*EditedAttention.lent, "host_config", "core_config")

    @classmethod
    def check_host(cls, module: nn.Module) -> None:
        if not hasattr(module, "config"):
            raise UnsupportedModel(
                f"model: {type(module).__name__} has no config that names its attention function;"
                " register an adapter with attention() and the route ThroughSdpa, if it calls that."
            )

    @classmethod
    def lend(cls, module: nn.Module) -> dict[str, Any]:
        renamed = Renamed(module.config, cls.implementation)
        return super().lend(module) | {"host_config": module.config, "core_config": renamed}

    @property
    def config(self) -> Any:
        return self.core_config

    @config.setter
    def config(self, config: Any) -> None:
        vars(self).update(
            config=config,
            host_config=config,
            core_config=Renamed(config, self.implementation),
        )


class ThroughInterface(WithConfig):
    """Attention that calls `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`.

    Attributes:
        host_reads: what the function that it would call reads, for compiled forwards, which cannot
            look; None: it hands on all that it is given.
        host_kind: which of transformers' implementations that function is.
    """

    implementation = NAME
    host_reads: tuple[str, ...] | None
    host_kind: str
    lent = (*WithConfig.lent, "host_reads", "host_kind")

    @classmethod
    def lend(cls, module: nn.Module) -> dict[str, Any]:
        name = implementation_of(module.config)
        found = found_function(module, name)
        return super().lend(module) | {"host_reads": found.reads, "host_kind": found.kind}

    @classmethod
    def check_host(cls, module: nn.Module) -> None:
        super().check_host(module)
        config = getattr(module, "host_config", module.config)
        found_function(module, implementation_of(config))

    @classmethod
    def prepare(cls) -> None:
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register(NAME, _attention_function)


class ThroughSdpa(EditedAttention):
    """Attention that calls `scaled_dot_product_attention` itself."""

    def through(self, *args: Any, **kwargs: Any) -> Any:
        detour = _SdpaDetour(self)
        with detour:
            output = super().through(*args, **kwargs)
        if not detour.called:
            raise UnsupportedModel(
                f"model: {type(self).__name__} did not call scaled_dot_product_attention, so that"
                " its attention was not changed; unpatch the attention modes from this model."
            )
        return output


class _SdpaDetour(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` is the core with the edits of one module."""

    def __init__(self, module: EditedAttention) -> None:
        super().__init__()
        self.module = module
        self.called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.called = True
            return self.module.attended(_sdpa_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _sdpa_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    check_not_traced(query)
    if is_causal:  # the kernel counts from the first key
        key = key[..., : query.shape[-2], :]
        value = value[..., : query.shape[-2], :]
    return Call(
        query,
        key,
        value,
        attn_mask,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p,
    )


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What `ALL_ATTENTION_FUNCTIONS` calls: head outputs (B, T, H, dv), and the probabilities.

    Probabilities are returned where the host is eager, else None.
    """
    reads, implementation = module.host_reads, module.host_kind
    if not torch.compiler.is_compiling():  # it may have been changed since the patch
        name = implementation_of(module.host_config)
        implementation, reads = found_function(module, name)
    kwargs = for_softmax(module, kwargs, reads, _KNOWN)
    call = _interface_call(module, implementation, query, key, value, attention_mask, **kwargs)
    weights: list[Tensor] = []
    if implementation == EAGER:
        call = call._replace(weights=weights)
    out = module.attended(call)
    return out.transpose(1, 2).contiguous(), weights[0] if weights else None


def _interface_call(
    module: Any,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Call:
    flash = implementation.startswith("flash")
    queries = query.shape[2]
    if is_causal is None or flash:  # flash attention goes by the module
        is_causal = bool(getattr(module, "is_causal", True))
    if is_causal and attention_mask is None and queries > 1 and implementation == "sdpa":
        # A static cache that was empty: behind the keys of these queries nothing is written yet.
        key = key[:, :, :queries]
        value = value[:, :, :queries]
    keys = key.shape[2]
    mask, causal = as_mask(
        attention_mask, implementation, queries, keys, is_causal, sliding_window, query.device
    )
    if position_bias is not None:
        mask = _added(mask, position_bias[..., :keys])
    scale = _scale(module, implementation, query) if scaling is None else scaling
    return Call(query, key, value, mask, causal, scale, dropout, softcap, s_aux, sliding_window)


def _added(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A bias of the logits, with a mask in it."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _scale(module: Any, implementation: str, query: Tensor) -> float:
    """The scale of an attention that does not tell it: GPT-2 in transformers 4.

    Its eager attention alone has further scales.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    if implementation == EAGER:
        if not getattr(module, "scale_attn_weights", True):
            scale = 1.0
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            scale /= module.layer_idx + 1
    return scale
