"""Patches on models that two processes share: FSDP2 before and after patching,
DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import biassurgery as bs
from tests.models import planted, tokens


def shard(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def fsdp_before(ids, sites, plain, zeroed):
    model = shard(planted("llama"))
    kind = type(model.model.layers[1])
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)
    bs.patch_model(model, "set_zero", sites=sites)
    torch.testing.assert_close(logits(model, ids), zeroed, rtol=0, atol=0)
    bs.unpatch_model(model)
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)
    assert type(model.model.layers[1]) is kind
    assert [s.mean for s in bs.calibrate(model, [ids], group=False)] == [s.mean for s in sites]


def fsdp_after(ids, sites, plain, zeroed):
    model = shard(bs.patch_model(planted("llama"), "set_zero", sites=sites))
    torch.testing.assert_close(logits(model, ids), zeroed, rtol=0, atol=0)
    bs.unpatch_model(model)
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)
    assert bs.patches(model) == ()
    with bs.patched(model, "set_zero", sites=sites):
        torch.testing.assert_close(logits(model, ids), zeroed, rtol=0, atol=0)


def ddp(ids, sites, plain, zeroed):
    model = DistributedDataParallel(planted("llama"))
    assert bs.patch_model(model, "set_zero", sites=sites) is model
    torch.testing.assert_close(logits(model, ids), zeroed, rtol=0, atol=0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def worker(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    try:
        ids = tokens()
        model = planted("llama")
        sites = bs.calibrate(model, [ids], group=False)
        plain = logits(model, ids)
        with bs.patched(model, "set_zero", sites=sites):
            zeroed = logits(model, ids)
        assert (zeroed - plain).abs().max() > 0.05
        for scene in (fsdp_before, fsdp_after, ddp):
            scene(ids, sites, plain, zeroed)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / "meet"),), nprocs=2)
