"""How a variant of a model is run: eager, compiled, or inside a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

WAYS = ("eager", "compiled", "graphs")
Patch = Callable[[Any], AbstractContextManager[Any]]


@contextmanager
def ready(model: Any, patch: Patch, way: str) -> Iterator[Any]:
    """The patched model; compiled: a copy of its own that stays patched."""
    if way == "compiled":
        yield compiled(model, patch)
    else:
        with patch(model):
            yield model


@cache
def compiled(model: Any, patch: Patch) -> Any:
    # The compiled copies share one code object; the default limit would let the later ones run
    # eagerly unseen.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    twin = copy.deepcopy(model)
    patch(twin).__enter__()  # never left
    return torch.compile(twin, dynamic=False)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """The same as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
