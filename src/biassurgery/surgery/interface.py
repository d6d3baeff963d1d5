"""Which attention function of transformers a module would call: told by the function itself.

A name does not tell it: users register functions of their own (`AttentionInterface.register`), and
libraries put theirs under the names of transformers' own, as kvpress does. The core knows what
transformers' functions compute; what another one computes it would replace without a word.
"""

from __future__ import annotations

import inspect
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.arguments import arguments_read
from biassurgery.surgery.swap import host_class

EAGER = "eager"
# transformers' functions by their own names, and the implementation that each of them is, whatever
# name it is registered under
_KINDS = {
    "eager_attention_forward": EAGER,
    "sdpa_attention_forward": "sdpa",
    "flex_attention_forward": "flex_attention",
    "flash_attention_forward": "flash_attention_2",
}
_HARMLESS = {"implementation"}  # what transformers binds of a function: which kernel it calls


def implementation_of(config: Any) -> str:
    """The name by which an attention with this config looks its function up."""
    return config._attn_implementation or EAGER


def check_function(module: nn.Module, name: str) -> None:
    """Raise `UnsupportedModel` if the core cannot stand in for a module's attention function.

    Args:
        module: an attention of transformers.
        name: of the implementation that its own config names.
    """
    function = _function(module, name)
    if _is_known(function):
        _check_sdpa(module, function)
    else:
        code = getattr(function, "__code__", None)
        place = repr(function) if code is None else f"{code.co_name} in {code.co_filename}"
        raise UnsupportedModel(
            f"model: the attention of {type(module).__name__} is computed by {place} (attention"
            f" implementation {name!r}), which is none of transformers' own functions: this library"
            " would compute something else in its place. model.set_attn_implementation('sdpa')"
            " first, or leave out what changes or watches attention."
        )


def _check_sdpa(module: nn.Module, function: Any) -> None:
    """Refuse where torch's own function, which transformers' calls, has been replaced."""
    if (
        function.__name__ == "sdpa_attention_forward"
        and torch.nn.functional.scaled_dot_product_attention
        is not torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]
    ):
        raise UnsupportedModel(
            f"model: the attention of {type(module).__name__} calls torch.nn.functional."
            "scaled_dot_product_attention, which somebody has replaced: this library would compute"
            " something else in its place. Put torch's own back first, or leave out what changes or"
            " watches attention."
        )


def kind_of(module: nn.Module, name: str) -> str:
    """Which of transformers' implementations a module's attention function is.

    Masks are built by the name; what becomes of them is up to the function, which may be one of
    transformers' own under another name.

    Args:
        module: an attention of transformers.
        name: of the implementation that its own config names.
    """
    return _KINDS.get(getattr(_function(module, name), "__name__", ""), name)


def reads_of(module: nn.Module, name: str) -> tuple[str, ...] | None:
    """The arguments that a module's attention function reads; None: it hands all of them on.

    What a caller gives to a model goes on from module to module by keyword and ends there, whether
    it is for the attention or not.

    Args:
        module: an attention of transformers.
        name: of the implementation that its own config names.
    """
    return arguments_read(_function(module, name))


def _function(module: nn.Module, name: str) -> Any:
    """What a module's forward would call."""
    if name == EAGER:  # each model's own, a global of its module
        forward = inspect.unwrap(host_class(module).forward)
        function = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get(name)
    # Kernels of a hub are bound to transformers' function; what is bound else may change it.
    while isinstance(function, partial) and not function.args and {*function.keywords} <= _HARMLESS:
        function = function.func
    return function


@lru_cache(maxsize=64)  # every forward asks
def _is_known(function: Any) -> bool:
    """Whether a function is written in transformers itself, and is not a wrapper around one."""
    code = getattr(function, "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(_transformers())


@cache
def _transformers() -> Path:
    import transformers

    return Path(transformers.__file__).parent
