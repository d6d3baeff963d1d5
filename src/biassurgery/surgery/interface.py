"""Which attention function of transformers a module would call: told by the function itself.

A name does not tell it: users register functions of their own (`AttentionInterface.register`), and
libraries put theirs under the names of transformers' own, as kvpress does. The core knows what
transformers' functions compute; what another one computes it would replace without a word.
"""

from __future__ import annotations

import inspect
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """What an attention function is.

    Attributes:
        kind: which of transformers' implementations. Masks are built by the name; what becomes of
            them is up to the function, which may be one of transformers' own under another name.
        reads: the arguments that it reads; None: it hands all of them on. What a caller gives to a
            model goes on from module to module by keyword and ends there, whether it is for the
            attention or not.
    """

    kind: str
    reads: tuple[str, ...] | None


def found_function(module: nn.Module, name: str) -> Found:
    """The attention function that a module's forward would call.

    Args:
        module: an attention of transformers.
        name: of the implementation that its own config names.

    Raises:
        UnsupportedModel: the core cannot stand in for it.
    """
    function = _function(module, name)
    found = _found(function)
    if found is None:
        code = getattr(function, "__code__", None)
        place = repr(function) if code is None else f"{code.co_name} in {code.co_filename}"
        raise UnsupportedModel(
            f"model: the attention of {type(module).__name__} is computed by {place} (attention"
            f" implementation {name!r}), which is none of transformers' own functions: this"
            f" library would compute something else in its place. {_way_out()}, or leave out what"
            " changes or watches attention."
        )
    if found.kind == "sdpa":
        _check_sdpa(module)
    return found if found.kind else found._replace(kind=name)


def _way_out() -> str:
    """What to do about a function that is not transformers' own."""
    if _found(_registered().get("sdpa")) is not None:
        return "model.set_attn_implementation('sdpa') first"
    return "That of 'sdpa' was replaced, too: do this in a process that does not import what did so"


def _check_sdpa(module: nn.Module) -> None:
    """Refuse where torch's own function, which transformers' calls, has been replaced."""
    if (
        torch.nn.functional.scaled_dot_product_attention
        is not torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]
    ):
        raise UnsupportedModel(
            f"model: the attention of {type(module).__name__} calls torch.nn.functional."
            "scaled_dot_product_attention, which somebody has replaced: this library would compute"
            " something else in its place. Put torch's own back first, or leave out what changes or"
            " watches attention."
        )


def _function(module: nn.Module, name: str) -> Any:
    """What a module's forward would call."""
    if name == EAGER:  # each model's own, a global of its module
        forward = inspect.unwrap(host_class(module).forward)
        function = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    else:
        function = _registered().get(name)
    # Kernels of a hub are bound to transformers' function; what is bound else may change it.
    while isinstance(function, partial) and not function.args and {*function.keywords} <= _HARMLESS:
        function = function.func
    return function


@cache  # every forward asks
def _registered() -> Any:
    """transformers' functions by name, where users and libraries put theirs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@lru_cache(maxsize=64)  # every forward asks
def _found(function: Any) -> Found | None:
    """What a function is; None: it is not written in transformers itself, or wraps one that is.

    Its kind is empty where it is a function of transformers that is known by no name.
    """
    code = getattr(function, "__code__", None)
    if code is None or not Path(code.co_filename).is_relative_to(_transformers()):
        return None
    return Found(_KINDS.get(function.__name__, ""), arguments_read(function))


@cache
def _transformers() -> Path:
    import transformers

    return Path(transformers.__file__).parent
