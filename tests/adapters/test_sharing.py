"""Which ranks take part in a measurement: by the meshes of a model, seen from every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from biassurgery.adapters.sharing import Sharing, everybody, sharing, without_ddp
from biassurgery.errors import BadOption


@contextmanager
def one_of(world: int, rank: int) -> Iterator[None]:
    """Within the block this process is one rank of a world whose others do not answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on(mesh: DeviceMesh) -> nn.Module:
    """A module with a parameter on a mesh."""
    module = nn.Linear(8, 8, bias=False)
    spread = distribute_tensor(module.weight.data, mesh, [Replicate()] * mesh.ndim)
    module.weight = nn.Parameter(spread)
    return module


def test_without_a_group_everybody_is_alone() -> None:
    model = nn.Linear(2, 2)
    assert sharing(model, None) is None
    assert sharing(model, False) is None
    with pytest.raises(BadOption, match="init_process_group"):
        sharing(model, "all")  # type: ignore[arg-type]
    with one_of(1, 0):
        assert sharing(model, None) is None


@pytest.mark.parametrize(
    ("shape", "names", "ranks", "together"),
    [
        ((8,), ("fsdp",), range(8), [5]),
        ((8,), ("tp",), range(8), range(8)),
        ((8,), None, range(8), range(8)),  # of parallelize_module
        ((2, 4), ("dp_replicate", "dp_shard"), range(8), [5]),
        ((4, 2), ("dp", "tp"), range(8), [4, 5]),
        ((2, 2, 2), ("pp", "fsdp", "tp"), range(8), [1, 0, 4, 5]),
        ((2, 2, 2), ("dp_replicate", "dp_shard", "cp"), range(8), [4, 5]),
        ((2, 4), ("dp_shard_cp", "tp"), range(8), range(8)),
        ((1, 8), ("dp", "tp"), range(8), range(8)),
    ],
)
def test_by_the_names_of_a_mesh(shape, names, ranks, together) -> None:
    with one_of(8, 5):
        found = sharing(on(init_device_mesh("cpu", shape, mesh_dim_names=names)), None)
    assert found is not None
    assert found.ranks == tuple(ranks)
    assert sorted(found.together) == sorted(together)


def test_each_that_runs_one_model_says_the_same() -> None:
    seen = []
    for rank in range(8):
        with one_of(8, rank):
            model = nn.Linear(8, 8)  # of plain parameters: DTensors remember an equal mesh
            names = ("data", "tensor")
            model._device_mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=names)
            seen.append(sharing(model, None))
    assert [each.together for each in seen] == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4


def test_what_fully_shard_makes() -> None:
    with one_of(4, 2):
        assert sharing(fully_shard(nn.Linear(8, 8)), None) == Sharing((0, 1, 2, 3), (2,))
        part = DeviceMesh("cpu", [2, 3])
        assert sharing(fully_shard(nn.Linear(8, 8), mesh=part), None) == Sharing((2, 3), (2,))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        both = on(mesh["tp"])
        assert sharing(both, None) == Sharing((0, 1, 2, 3), (2, 3))
        assert sharing(fully_shard(both, mesh=mesh["dp"]), None) == Sharing((0, 1, 2, 3), (2, 3))


def test_what_transformers_says() -> None:
    """Its tensor-parallel models may have plain parameters, and keep the mesh."""
    with one_of(4, 2):
        model = nn.Linear(8, 8)
        model._device_mesh = DeviceMesh("cpu", [2, 3], mesh_dim_names=("tp",))
        assert sharing(model, None) == Sharing((0, 1, 2, 3), (2, 3))


def test_a_given_group_comes_first() -> None:
    with one_of(4, 2):
        model = on(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
        assert sharing(model, dist.new_group([2, 0])) == Sharing((0, 2), (2, 3))
        assert sharing(model, dist.new_group([2])) is None
        assert sharing(model, False) is None
        for group in (True, "all", 3, dist.new_group([0, 1])):
            with pytest.raises(BadOption, match=r"group: .*ProcessGroup that this rank is in"):
                sharing(model, group)
        assert everybody("all") == Sharing((0, 1, 2, 3), (2,))
        assert everybody(dist.new_group([0, 1])) is None


def test_distributed_data_parallel() -> None:
    inner = nn.Linear(8, 8)
    with one_of(4, 2):
        group = dist.new_group([1, 2])
        model = nn.parallel.DistributedDataParallel(inner, process_group=group)
        compiled = torch.compile(model, backend="eager")
        for wrapped in (model, compiled):
            assert sharing(wrapped, None) == Sharing((1, 2), (2,))
            assert without_ddp(wrapped) is inner
    assert without_ddp(inner) is inner


def test_what_is_no_model_is_everybodys() -> None:
    with one_of(4, 2):
        for thing in (None, "llama", SimpleNamespace(parameters=3)):
            assert sharing(thing, None) == Sharing((0, 1, 2, 3), (2,))
