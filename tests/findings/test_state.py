"""What is counted, as JSON and tensors and back."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from biassurgery.findings.leftovers import remove_leftovers
from biassurgery.findings.state import pack, unpack
from biassurgery.findings.sums import Sums


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(value, tensors))
    return unpack(json.loads(text), tensors)


def test_everything_comes_back_as_it_was() -> None:
    value = {
        ("layer", 3, None): 0.1 + 0.2,
        (0, frozenset({2**60 + 1, 5})): [1, (2, ("x",)), [], ()],
        None: -math.inf,
        True: {"nested": {}},
        2**70: -0.0,
    }
    back = there_and_back(value)
    assert repr(back) == repr(value)
    assert list(back) == list(value)
    assert math.isnan(there_and_back([float("nan")])[0])
    assert there_and_back(Counter({(1, 2): 3})) == {(1, 2): 3}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(math.pi, dtype=torch.float64),
        torch.arange(6).reshape(2, 3).T,
        torch.zeros(0, 4, dtype=torch.bool),
        torch.tensor([1e-45, float("nan"), -0.0, torch.inf]),
        torch.tensor([[1.5, -2.5]], dtype=torch.bfloat16),
    ],
)
def test_tensors_come_back_bit_by_bit(tensor: torch.Tensor) -> None:
    back = there_and_back(Sums({("a", 0): tensor}))["a", 0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    plain = (t.contiguous().reshape(-1).view(torch.uint8) for t in (back, tensor))
    assert torch.equal(*plain)


def test_tensors_are_copies() -> None:
    rows = torch.zeros(2, 3)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack({"first": rows[0], "second": rows[1], "again": rows[0]}, tensors)
    rows += 1
    assert all(not tensor.any() for tensor in tensors.values())
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 3
    assert list(unpack(packed, tensors)) == ["first", "second", "again"]


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"a": {1, 2}}, "builtins.set"),
        ([object()], "builtins.object"),
        ({Pair(1): 2}, r"tests\.findings\.test_state\.Pair"),  # it would come back as a tuple
        (1j, "builtins.complex"),
    ],
)
def test_what_would_not_come_back_is_refused(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        pack(value, {})


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    end = "0123abcd.part"
    names = [f"a.b.{child}.{end}", f"a.b.{os.getpid()}.{end}", f"axb.{child}.{end}"]
    names += ["a.b", "a.b.part", f"a.b.x{child}.{end}", f"a.b.rank0.{child}.{end}"]
    for name in names:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "a.b")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    remove_leftovers(tmp_path / "no folder" / "a.b")
