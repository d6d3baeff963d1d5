"""Hidden states, read by hooks and rewritten by loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tests import models
from tests.models import LAYERS

FAMILIES = ("llama", "gpt2", "falcon")


def hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def outputs(model: nn.Module, family: str) -> Iterator[list[list[Tensor]]]:
    """Every output of every block while the context is open, by forward hooks."""
    seen: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        block.register_forward_hook(
            lambda _, __, out, layer=layer: seen[layer].append(hidden_of(out).clone())
        )
        for layer, block in enumerate(models.blocks(model, family))
    ]
    yield seen
    for hook in hooks:
        hook.remove()
