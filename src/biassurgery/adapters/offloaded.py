"""Weights that accelerate keeps elsewhere, on disk or in CPU memory, brought for longer at once.

accelerate's hooks bring the weights of a module when its forward begins, and drop them when it
ends. Here they are brought once for many forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

Hooked = tuple[nn.Module, Any]


def offloaded_in(module: nn.Module) -> list[Hooked]:
    """The modules in a module whose weights are elsewhere, each with the hook that brings them."""
    return [
        (inner, hook)
        for inner in module.modules()
        for hook in _hooks_of(inner)
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None
    ]


@contextmanager
def resting(hooked: Iterable[Hooked]) -> Iterator[None]:
    """Within the block no forward brings weights; afterwards all are elsewhere again."""
    kept = list(hooked)
    try:
        for _, hook in kept:
            hook.offload = False
        yield
    finally:
        for _, hook in kept:
            hook.offload = True


@contextmanager
def brought(hooked: Iterable[Hooked]) -> Iterator[None]:
    """Within the block these weights are there, and forwards neither bring nor drop them."""
    with ExitStack() as there:
        for module, hook in hooked:
            there.enter_context(_brought(module, hook))
        yield


@contextmanager
def _brought(module: nn.Module, hook: Any) -> Iterator[None]:
    before = hook.offload
    try:
        hook.offload = True
        hook.pre_forward(module)
        hook.offload = False
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)
        hook.offload = before


def sources_in(root: nn.Module) -> dict[str, Any]:
    """Where the offloaded weights of a model are, by their names in it.

    A file on disk is told by its path, its size and the time of its last change; weights that are
    kept in memory are the tensors themselves.
    """
    names = {module: name for name, module in root.named_modules()}
    found: dict[str, Any] = {}
    for module, hook in offloaded_in(root):
        for name, _ in module.named_parameters(recurse=hook.place_submodules):
            whole = ".".join(filter(None, (names[module], name)))
            found[whole] = _source(hook.weights_map, name)
    return found


def _source(weights: Any, name: str) -> Any:
    """Where accelerate has a weight."""
    if hasattr(weights, "prefix") and hasattr(weights, "dataset"):
        return _source(weights.dataset, f"{weights.prefix}{name}")
    index: Mapping[str, Any] = getattr(weights, "index", {})
    if name not in index:
        return weights[name]
    entry = index[name]
    file = entry.get("safetensors_file") or Path(weights.save_folder) / f"{name}.dat"
    status = Path(file).stat()
    return [str(entry.get("weight_name", name)), status.st_size, status.st_mtime_ns]


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
