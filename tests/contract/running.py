"""Running a case: what a block returned and what came out, and how near two of them are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.contract.cases import Case
from tests.state import output_tensor as logits_of


def accepts(model: Any, name: str) -> bool:
    """Whether a model's forward takes an argument by this name."""
    return name in inspect.signature(model.forward).parameters


def cache_name(model: Any) -> str:
    """What the installed transformers calls the cache of a forward and of its output."""
    return "cache" if accepts(model, "cache") else "past_key_values"


def hidden_of(output: Any) -> Tensor:
    """The hidden state that a block returned."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Seen:
    """One run: the output (B, T, D) of the patched block, and the logits."""

    hidden: Tensor
    logits: Tensor


@contextmanager
def default_dtype_of(model: Any) -> Iterator[None]:
    """MPT of transformers 4 makes its mask in the default dtype.

    The smallest float64 does not fit into it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(
        torch.float64 if next(model.parameters()).dtype == torch.float64 else before
    )
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def see(case: Case, model: Any, batch: Tensor, **arguments: Any) -> Seen:
    """Run a model without gradients, with the same random numbers each time."""
    hidden: list[Tensor] = []
    handle = case.block(model).register_forward_hook(
        lambda _, __, output: hidden.append(hidden_of(output).clone())
    )
    torch.manual_seed(123)
    try:
        with torch.no_grad(), default_dtype_of(model):
            logits = logits_of(model(batch, **arguments))
    finally:
        handle.remove()
    return Seen(torch.cat(hidden, 1), logits)


def substitute(case: Case, model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Let an unpatched model go on with `change(hidden)` after the block.

    What a patch must amount to, by a plain forward hook.
    """

    def replaced(_module: Any, _inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    case.block(model).register_forward_hook(replaced)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to a fraction of the largest magnitude.

    Two orders of computing the same float32 numbers differ by up to 3e-5.
    """
    assert found.shape == wanted.shape
    assert distance(found, wanted) <= tolerance


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((a - b).abs().max() / b.abs().max()).item()
