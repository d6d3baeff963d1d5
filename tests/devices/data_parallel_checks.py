"""FSDP2 and DistributedDataParallel, each mode before and after: two ranks, each half of a batch.

Every number is compared with one process that reads the whole batch.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.devices.tensor_parallel_checks import KINDS, LARGE, close, logits
from tests.models import LAYERS, planted, tokens

Patch = tuple[str, dict[str, Any]]
ROWS = 4


def shard(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def own_rows(ids: Tensor) -> Tensor:
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def on_activations(folder: Path) -> list[Patch]:
    sites = bs.Sites.load(folder / "sites")
    return [
        ("set_zero", {"sites": sites, "layers": "all"}),
        ("set_mean", {"sites": sites}),
        ("set_value", {"value": 9.0, "channels": 3, "positions": (0, 4), "layers": [2]}),
        ("zero_random", {"sites": sites}),
        ("instrument", {}),
        ("attention_bias", {"kind": "off_by_one"}),
    ]


def with_parameters(folder: Path) -> list[Patch]:
    normal = {"init": "normal", "std": 1.0}
    biases = [("attention_bias", {"kind": kind, **normal}) for kind in KINDS]
    return [*biases, ("transplant", {"key_values": bs.KeyValues.load(folder / "key_values")})]


def patched(patch: Patch) -> Any:
    """A planted model with a patch, the same one on every rank."""
    mode, options = patch
    torch.manual_seed(3)
    return bs.patch_model(planted("llama"), mode, **options)


def after(folder: Path) -> None:
    """Patched, then sharded or wrapped: outputs, gradients, one step; then undone."""
    for patch in (on_activations(folder)[0], with_parameters(folder)[0]):
        for wrap in (shard, DistributedDataParallel):
            _train(patch, wrap(patched(patch)))


def before(folder: Path) -> None:
    """Sharded or wrapped, then patched."""
    mode, options = on_activations(folder)[0]
    for wrap in (shard, DistributedDataParallel):
        model = wrap(planted("llama"))
        assert bs.patch_model(model, mode, **options) is model
        _train((mode, options), model)


def every_mode_after(folder: Path) -> None:
    for patch in (*on_activations(folder)[1:], *with_parameters(folder)[1:]):
        for wrap in (shard, DistributedDataParallel):
            _train(patch, wrap(patched(patch)))


def every_mode_before(folder: Path) -> None:
    for mode, options in on_activations(folder)[1:]:
        for wrap in (shard, DistributedDataParallel):
            _train((mode, options), bs.patch_model(wrap(planted("llama")), mode, **options))


def refused(folder: Path) -> None:
    """New parameters on a wrapped model, whose gradients would stay each rank's own."""
    ids = tokens()
    for wrap in (shard, DistributedDataParallel):
        model = wrap(planted("llama"))
        plain = logits(model, ids)
        names = [name for name, _ in model.named_parameters()]
        for mode, options in with_parameters(folder):
            with pytest.raises(UnsupportedModel, match="patch the model first, then wrap it"):
                bs.patch_model(model, mode, **options)
        assert bs.patches(model) == ()
        assert [name for name, _ in model.named_parameters()] == names
        assert logits(model, ids).equal(plain)


def _train(patch: Patch, model: Any) -> None:
    """A step on half a batch each, against one process with the whole batch; undone, another."""
    ids = tokens(ROWS)
    whole = patched(patch)
    if patch[0] not in ("set_mean", "instrument", "transplant"):
        assert (logits(whole, ids) - logits(planted("llama"), ids)).abs().max() > LARGE, patch
    _step(model, whole, ids)
    inner = model
    if isinstance(model, DistributedDataParallel):
        inner = model.module
        if any("bias_" in name or "transplant" in name for name, _ in inner.named_parameters()):
            with pytest.raises(UnsupportedModel, match="waits for the gradients"):
                bs.unpatch_model(model)
            model = None
    for one in (inner, whole):
        bs.unpatch_model(one)
    names = [name for name, _ in planted("llama").named_parameters()]
    assert [name for name, _ in inner.named_parameters()] == names
    if model is None:
        model = DistributedDataParallel(inner)
    _step(model, whole, ids)


def _step(model: Any, whole: Any, ids: Tensor) -> None:
    """Outputs, loss, gradients and what a step of them makes of the outputs."""
    close(logits(model, own_rows(ids)), own_rows(logits(whole, ids)), 2e-5)
    losses = []
    # FSDP2 has the root's parameters gathered now; those that it keeps are there in the backward.
    for one, batch in ((model, own_rows(ids)), (whole, ids)):
        losses.append(one(batch, labels=batch, use_cache=False).loss)
        losses[-1].backward()
    total = losses[0].detach().clone()
    dist.all_reduce(total)
    close(total / dist.get_world_size(), losses[1].detach())
    _same_gradients(model, whole)
    for one in (model, whole):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
    close(logits(model, own_rows(ids)), own_rows(logits(whole, ids)), 2e-5)


def _same_gradients(model: nn.Module, whole: nn.Module) -> None:
    expected = dict(whole.named_parameters())
    found = 0
    for name, parameter in model.named_parameters():
        other = expected[name.removeprefix("module.")].grad
        if other is None:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        largest = other.abs().max().clamp(min=1e-4)
        close(gathered(parameter.grad) / largest, other / largest, 1e-4)
        found += 1
    assert found >= 9 * LAYERS


def undone_bitwise(folder: Path) -> None:
    """What was on before `fully_shard` is undone to the bit."""
    ids = tokens()
    for patch in (*on_activations(folder), *with_parameters(folder)):
        model = shard(patched(patch))
        changed = logits(model, ids)
        bs.unpatch_model(model)
        plain = logits(planted("llama"), ids)
        assert logits(model, ids).equal(plain), patch
        assert patch[0] in ("set_mean", "instrument") or not changed.equal(plain), patch
        assert bs.patches(model) == ()


def trainable_bias(_: Path) -> None:
    """What `trainable="bias"` froze trains again, whichever parameters FSDP2 has made of it.

    The patch does not keep the whole ones alive.
    """
    model = bs.patch_model(planted("llama"), "attention_bias", kind="kv", trainable="bias")
    whole = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model = shard(model)
    gc.collect()
    assert whole() is None
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    logits(model, tokens())  # the root's parameters stay gathered
    assert trained
    assert all("attention_bias_kv" in name for name in trained)
    bs.unpatch_model(model)
    model.reshard()
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = own_rows(tokens())
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def observed(folder: Path) -> None:
    """What is measured on a sharded model is what is measured on a whole one."""
    ids = own_rows(tokens())
    model, whole = shard(planted("llama")), planted("llama")
    what = ("q", "k", "v", "probs", "sink_mass", "value_updates", "block_input", "block_output")
    with torch.no_grad(), bs.record(model, what) as ours, bs.record(whole, what) as theirs:
        model(ids)
        whole(ids)
    for name in what:
        for layer in range(LAYERS):
            assert ours[name][layer].equal(theirs[name][layer]), name
    sites = bs.Sites.load(folder / "sites")
    for one, other in zip(bs.calibrate(model, [ids]), sites, strict=True):
        assert (one.layer, one.channel, one.role) == (other.layer, other.channel, other.role)
        assert one.count == other.count
        assert one.mean == pytest.approx(other.mean, rel=1e-6)
    assert str(bs.detect(model, [ids])) == str(bs.detect(whole, [ids]))
    found, expected = (
        bs.calibrate_key_values(model, [ids]),
        bs.KeyValues.load(folder / "key_values"),
    )
    assert found.count == expected.count
    close(found.keys, expected.keys)
    close(found.values, expected.values)


def files(folder: Path) -> None:
    """A patch is saved whole from a sharded model."""
    ids = tokens()
    for patch in with_parameters(folder)[-2:]:
        bs.save_patch(shard(patched(patch)), folder / "sharded")
        dist.barrier()
        loaded = bs.load_patch(planted("llama"), folder / "sharded")
        dist.barrier()
        assert logits(loaded, ids).equal(logits(patched(patch), ids)), patch


FAST = (after, before, refused, trainable_bias, observed, files)
LONG = (every_mode_after, every_mode_before, undone_bitwise)
CHECKS = FAST + LONG
