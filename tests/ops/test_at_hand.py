"""Where Python may look at numbers: never where a forward is traced, mapped or on stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from biassurgery.ops.at_hand import at_hand


def test_a_few_numbers_on_the_cpu() -> None:
    assert at_hand(torch.zeros(1, 1, 3))
    assert at_hand(torch.zeros(2, dtype=torch.bfloat16, requires_grad=True))
    assert not at_hand(torch.zeros(65))
    assert not at_hand(torch.zeros(3, device="meta"))
    assert not at_hand(torch.nn.Parameter(torch.zeros(3)))  # a class of its own, as DTensor is


def fake(look: Callable[[Tensor], Tensor]) -> Any:
    with FakeTensorMode():
        return look(torch.zeros(3))


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "fake": fake,
    "vmap": lambda look: torch.vmap(look)(torch.zeros(2, 3)),
    "grad": lambda look: torch.func.grad(lambda x: look(x).sum())(torch.zeros(3)),
    "make_fx": lambda look: make_fx(look)(torch.zeros(3)),
    "jit": lambda look: torch.jit.trace(look, torch.zeros(3), check_trace=False),
    "compile": lambda look: torch.compile(look, backend="eager", fullgraph=True)(torch.zeros(3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_not_where_they_are_not_known(way: str) -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(at_hand(x))
        return x * 2

    WAYS[way](look)
    assert seen
    assert not any(seen)
