"""Weights that accelerate keeps elsewhere, on disk or in CPU memory, brought for longer at once.

accelerate's hooks bring the weights of a module when its forward begins, and drop them when it
ends. Here they are brought once for many forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    before = hook.offload, hook.weights_map
    try:
        hook.offload = True
        hook.weights_map = _Read(hook.weights_map)
        hook.pre_forward(module)
        hook.offload = False
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)
        hook.offload, hook.weights_map = before


class _Read(Mapping[str, Tensor]):
    """Weights that are read from their files, not mapped into memory.

    A mapped weight keeps the mapping of its whole file, which the system counts as memory of the
    process (RLIMIT_DATA), and is read in small pieces whenever they are needed.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        mapped = weight.device.type == "cpu" and _entry(self.weights, name) is not None
        return weight.clone() if mapped else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@contextmanager
def hollow(root: nn.Module) -> Iterator[None]:
    """Within the block a forward brings zeros for weights that are elsewhere, and reads nothing.

    For runs of which only the way is asked, not the numbers: which code they come by, in what order
    and with which positions.
    """
    kept = [(module, hook, hook.weights_map) for module, hook in offloaded_in(root)]
    try:
        for module, hook, weights in kept:
            hook.weights_map = _Zeros(module, weights)
        yield
    finally:
        for _, hook, weights in kept:
            hook.weights_map = weights


class _Zeros(Mapping[str, Tensor]):
    """Zeros of the shapes and dtypes of a module's weights.

    A system that gives memory when it is written (Linux) gives none for them on the CPU.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.module = module
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        inside, _, own = name.rpartition(".")
        weight: Tensor = getattr(self.module.get_submodule(inside), own)
        return torch.zeros(weight.shape, dtype=weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def sources_in(root: nn.Module) -> dict[str, Any]:
    """Where the offloaded weights of a model are, by their names in it.

    What is on disk is told by its name in its file, the file's size and the time when it was last
    written; what is kept in memory is the tensor itself.
    """
    names = {module: name for name, module in root.named_modules()}
    found: dict[str, Any] = {}
    for module, hook in offloaded_in(root):
        for name, _ in module.named_parameters(recurse=hook.place_submodules):
            entry = _entry(hook.weights_map, name)
            whole = ".".join(filter(None, (names[module], name)))
            found[whole] = hook.weights_map[name] if entry is None else _told(*entry)
    return found


def _entry(weights: Any, name: str) -> tuple[str, Path] | None:
    """The name of a weight in its file, and the file; None: accelerate has it in memory."""
    if hasattr(weights, "prefix") and hasattr(weights, "dataset"):
        return _entry(weights.dataset, f"{weights.prefix}{name}")
    entry = getattr(weights, "index", {}).get(name)
    if entry is None:
        return None
    file = entry.get("safetensors_file") or Path(weights.save_folder) / f"{name}.dat"
    return entry.get("weight_name", name), Path(file)


def _told(name: str, file: Path) -> list[Any]:
    status = file.stat()
    return [name, status.st_size, status.st_mtime_ns]


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
