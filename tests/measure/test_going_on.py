"""`checkpoint=` where ranks run one model together: what is told of it, and when it is refused.

torch's fake process group stands for two ranks, of which this process is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from biassurgery.adapters.registry import find_host
from biassurgery.adapters.sharing import Sharing, needed_ranks
from biassurgery.errors import BadOption, FileError
from biassurgery.measure import ranks
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.fingerprint import facts_of
from tests.models import planted, tokens

_WEIGHT = "model.layers.2.mlp.up_proj"


@pytest.fixture(autouse=True)
def _two_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def split(name: str) -> nn.Module:
    """A model with one weight that is split over the ranks of a mesh."""
    model = planted("llama")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    layer: Any = model.get_submodule(_WEIGHT)
    part = layer.weight.detach().chunk(2)[0]
    layer.weight = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
    return model


def test_a_split_weight_is_told_by_its_own_part() -> None:
    model = split("tp")
    told = facts_of(find_host(model), "checkpoint")
    assert facts_of(find_host(split("tp")), "checkpoint") == told
    layer: Any = model.get_submodule(_WEIGHT)
    layer.weight.to_local().data[[0, 1]] = layer.weight.to_local().data[[1, 0]]
    other = facts_of(find_host(model), "checkpoint")
    assert {name for name in told if told[name] != other[name]} == {"weights"}


def test_which_ranks_a_model_needs() -> None:
    assert needed_ranks(planted("llama")) == ()
    assert needed_ranks(split("tp")) == (0, 1)
    assert needed_ranks(split("dp")) == ()  # replicas
    sharded = planted("llama")
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    assert needed_ranks(sharded) == (0, 1)


class Counting:
    """The count of a pass, in batches."""

    def __init__(self) -> None:
        self.batches = 0

    def state(self) -> int:
        return self.batches

    def restore(self, state: int) -> None:
        self.batches = state


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a call of which the other rank has counted so many batches."""

    def begin(others: int) -> None:
        def agree(mine: Any, how: Callable[[dict[int, Any]], Any]) -> Any:
            return how({0: mine, 1: (mine[0], others)})

        both = ranks.Ranks(Sharing((0, 1), (0, 1)), SimpleNamespace(agree=agree))  # type: ignore
        monkeypatch.setattr(ranks, "_innermost", SimpleNamespace(get=lambda: both))

    return begin


def read(file: Path, model: nn.Module, number: int) -> list[int]:
    """The batches, as they come from a pass with a checkpoint; which of them were run."""
    counting = Counting()
    batches = [tokens(seed=seed) for seed in range(number)]
    kept = checkpointed(batches, file, "a pass", find_host(model), counting, batches=batches)
    run = []
    for batch in kept:
        run.append(next(at for at, other in enumerate(batches) if other.equal(batch)))
        counting.batches += 1
    return run


def test_ranks_that_have_counted_other_batches_are_refused(
    tmp_path: Path, call: Callable[[int], None]
) -> None:
    file = tmp_path / "pass"
    model = split("tp")
    call(0)
    assert read(file, model, 2) == [0, 1]
    (own,) = tmp_path.iterdir()
    assert own.name == "pass.rank0"
    content = own.read_bytes()
    for others in (1, 3):
        call(others)
        with pytest.raises(FileError, match=rf"rank 0 has counted 2 .* rank 1 {others}, .*delete"):
            read(file, model, 4)
        assert own.read_bytes() == content
    call(2)
    assert read(file, model, 4) == [2, 3]
    call(0)
    read(tmp_path / "replica", planted("llama"), 2)
    assert read(tmp_path / "replica", planted("llama"), 3) == [2]  # each on its own data


def test_ranks_outside_of_the_call_are_refused(tmp_path: Path) -> None:
    """As with group=False: nobody can be asked what it has counted."""
    with pytest.raises(BadOption, match=r"ranks \[0, 1\] run .* group= leaves \[0, 1\] out"):
        read(tmp_path / "pass", split("tp"), 2)
    assert not list(tmp_path.iterdir())
