"""What has been counted so far as JSON and tensors, exactly, so that a file can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PLAIN = (str, bool, int, float)


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a value; its tensors go to `tensors`, under numbers that the JSON names.

        {("a", 1): tensor}   {"items": [[{"tuple": ["a", 1]}, {"tensor": "0"}]]}

    Args:
        value: numbers, texts, None, tensors, and tuples, lists, frozensets and mappings of these.
        tensors: is added to; copies on the CPU, which share no memory.

    Raises:
        TypeError: something else, whose class the message names.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = value.items()
        return {"items": [[pack(key, tensors), pack(item, tensors)] for key, item in items]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [pack(item, tensors) for item in value]}
    if type(value) is frozenset:
        return {"frozenset": [pack(item, tensors) for item in sorted(value)]}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` has packed: mappings as plain dicts, in their order.

    Raises:
        LookupError, TypeError, ValueError: it is nothing that `pack` makes.
    """
    if packed is None or isinstance(packed, _PLAIN):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    return {"tuple": tuple, "list": list, "frozenset": frozenset}[kind](
        unpack(item, tensors) for item in content
    )
