"""Which of the arguments that an attention is given reach its softmax.

What a caller gives to a model goes on from module to module by keyword, and ends in the attention
function whether it is for that or not: labels of a loss, for example.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from torch import nn

from biassurgery.errors import UnsupportedModel

# What is for other purposes than the softmax. It is asked where a function hands all its arguments
# on (those to flash kernels do), and of what one reads in order to warn.
_ELSEWHERE = frozenset(
    (
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "return_dict",
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "past_key_values",
        "past_key_value",
        "token_type_ids",
        "hidden_states",
        "deterministic",
        "kernel_options",
    )
)
# What may come from a caller to a host that does not compute with it; of the others that the core
# knows, the mask says the same.
_ONLY_IF_READ = ("softcap", "position_bias", "s_aux")


def for_softmax(
    module: nn.Module,
    given: dict[str, Any],
    reads: tuple[str, ...] | None,
    known: Collection[str],
) -> dict[str, Any]:
    """Those of an attention's further arguments that its softmax goes by, all of them known.

    Args:
        module: the attention.
        given: arguments by name; one that is None says nothing.
        reads: the names of those that it can read, by `arguments_read`.
        known: the names of those that the core knows.

    Raises:
        UnsupportedModel: one that is not known may change the softmax.
    """
    said: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in given.items():  # in one pass, for every forward of every layer comes here
        if value is None:
            continue
        is_read = reads is None or name in reads
        if name in known:
            if is_read or name not in _ONLY_IF_READ:
                said[name] = value
        elif is_read and name not in _ELSEWHERE:
            unknown.append(name)
    if unknown:
        raise UnsupportedModel(
            f"model: {type(module).__name__} gives its attention {sorted(unknown)}, which the core"
            " of this library does not know; unpatch the attention modes from this model."
        )
    return said


@lru_cache(maxsize=64)  # every forward asks
def arguments_read(function: Any) -> tuple[str, ...] | None:
    """The names of the arguments that a function can read; None: that is not known.

    They are in its signature, or looked up by name in its `**kwargs`, as in `kwargs.get("name")`.
    """
    try:
        written = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(written, ast.FunctionDef):
        return None
    arguments = written.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    if any(isinstance(node, ast.Attribute) and node.attr == "sinks" for node in ast.walk(written)):
        names.add("s_aux")  # eager attention takes them from the module
    if arguments.kwarg is None:
        return tuple(sorted(names))
    keywords = arguments.kwarg.arg
    looked_up = [_looked_up(node, keywords) for node in ast.walk(written)]
    found = [name for name in looked_up if name is not None]
    uses = sum(isinstance(node, ast.Name) and node.id == keywords for node in ast.walk(written))
    return tuple(sorted(names.union(found))) if uses == len(found) else None


def _looked_up(node: ast.AST, keywords: str) -> str | None:
    """The name that `kwargs.get("name")` or `kwargs.pop("name")` looks up; None: it is not that."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=held), attr="get" | "pop"),
            args=[ast.Constant(value=str(name)), *_],
        ) if held == keywords:
            return name
    return None
