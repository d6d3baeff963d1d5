"""What a model with a patch on activations computes: nothing new, or its mode's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from tests.contract.cases import (
    CHANNELS,
    LENGTH,
    Case,
    activation_cases,
    parametrize,
    typical,
    typical_cases,
)
from tests.contract.oracle import assert_edited, entries
from tests.contract.running import default_dtype_of, distance, logits_of, see, substitute
from tests.models import CHANNEL, LAYER
from tests.state import untouched


def site(level: float, gate: float, cluster: int = 0) -> bs.Site:
    return bs.Site(LAYER, CHANNEL, "elsewhere", mean=level, gate=gate, cluster=cluster)


@activation_cases
def test_identity(case: Case) -> None:
    """A patch that writes what stands there already is bitwise nothing."""
    batch = case.batch(1) if case.mode != "shuffle" else case.batch(1).repeat_interleave(2, 0)
    plain = see(case, case.model(), batch)
    values = plain.hidden[0, :, CHANNEL][case.massive(batch)[0]].tolist()
    largest, second = sorted(map(abs, values), reverse=True)[:2]
    exact = bs.Sites([site(value, 1000.0, i) for i, value in enumerate(values)])
    unreachable = bs.Sites([site(values[0], 2 * largest)])
    sites, options = {
        "set_mean": (exact, {}),
        "noise": (exact, {}),
        "shuffle": (exact, {}),
        "set_value": (
            bs.Sites([site(values[0], (largest + second) / 2)]),
            {"value": max(values, key=abs)},
        ),
    }.get(case.mode, (unreachable, {}))
    if case.positional:
        options = {
            "value": plain.hidden[0, 4, CHANNELS[0]].item(),
            "channels": CHANNELS[0],
            "positions": 4,
        }
    found = see(case, case.patch(case.model(), sites=sites, **options), batch)
    assert torch.equal(found.hidden, plain.hidden)
    assert torch.equal(found.logits, plain.logits)


@activation_cases
def test_nothing_massive(case: Case) -> None:
    """Below the gates, or at positions beyond the input, every mode is bitwise nothing."""
    batch = case.batch()
    plain = case.model()
    options = {"positions": 999} if case.positional else {}
    found = see(
        case, case.patch(case.model(), sites=bs.Sites([site(3000.0, 1e6)]), **options), batch
    )
    assert torch.equal(found.logits, see(case, plain, batch).logits)


# Fractions of the largest logit: removing a massive activation breaks the model, its mean does not.
BREAKS = 0.02
HARMLESS = 0.005


@activation_cases
def test_effect(case: Case) -> None:
    """The block's output is edited as the mode says, and the rest of the model goes on from it."""
    batch = case.batch()
    sites = case.sites(std=200.0)
    before = see(case, case.model(), batch)
    after = see(case, case.patch(case.model(), sites), batch)
    assert_edited(case, before.hidden, after.hidden, case.massive(batch), sites)
    assert not torch.equal(before.hidden, after.hidden)
    reference = case.model()
    substitute(case, reference, lambda hidden: after.hidden)
    assert torch.equal(after.logits, see(case, reference, batch).logits)
    moved = distance(after.logits, before.logits)
    assert moved > 0
    if case.mode in ("set_zero", "set_value"):
        assert moved > BREAKS
    if case.mode in ("set_mean", "zero_random"):
        assert moved < HARMLESS


@activation_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(case: Case, dtype: torch.dtype) -> None:
    batch = case.batch()
    sites = case.sites(std=400.0)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    before = see(case, case.model(dtype), batch)
    after = see(case, case.patch(case.model(dtype), sites), batch)
    assert after.hidden.dtype == after.logits.dtype == dtype
    assert after.logits.isfinite().all()
    assert_edited(case, before.hidden, after.hidden, case.massive(batch), sites)


@activation_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_after_patching(case: Case, dtype: torch.dtype) -> None:
    """A patched model that is cast equals a cast model that is patched.

    The levels lose nothing on the way there and back.
    """
    model = case.patched().to(dtype)
    batch = case.batch()
    low = batch.to(dtype) if batch.is_floating_point() else batch
    assert torch.equal(see(case, model, low).logits, see(case, case.patched(dtype), low).logits)
    assert torch.equal(
        see(case, model.float(), batch).logits,
        see(case, case.patch(case.model(dtype).float()), batch).logits,
    )


@activation_cases
def test_autocast(case: Case) -> None:
    batch = case.batch()
    sites = case.sites(std=400.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = see(case, case.model(), batch)
        after = see(case, case.patch(case.model(), sites), batch)
    assert after.logits.dtype == before.logits.dtype
    assert_edited(case, before.hidden, after.hidden, case.massive(batch), sites)
    assert not torch.equal(before.hidden, see(case, case.model(), batch).hidden)  # autocast was on


def step(model: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step."""
    torch.manual_seed(123)
    with default_dtype_of(model):
        output = logits_of(model(batch))
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    with default_dtype_of(model):  # checkpointed blocks run again
        loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@activation_cases
def test_backward(case: Case) -> None:
    """The gradients are those of a plain hook that writes the same.

    None flow through a value that was replaced by a constant.
    """
    batch = case.batch()
    after = see(case, case.patched(), batch).hidden
    written = entries(case, see(case, case.model(), batch).hidden, after, case.massive(batch))
    reference = case.model()

    def edit(hidden: Tensor) -> Tensor:
        return torch.where(written, hidden.flip(0) if case.mode == "shuffle" else after, hidden)

    substitute(case, reference, edit)
    loss, gradients = step(case.patched(), batch)
    wanted_loss, wanted = step(reference, batch)
    assert torch.equal(loss, wanted_loss)
    assert_same_gradients(gradients, wanted)
    _, plain = step(case.model(), batch)
    assert any(not torch.allclose(gradients[name], plain[name]) for name in plain)


def enable_checkpointing(case: Case, model: Any, reentrant: bool) -> None:
    """Turn it on in the way of the model's own library.

    Only transformers leaves the choice between two ways of it.
    """
    if case.library == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.config.use_cache = False
    else:
        model.set_grad_checkpointing(True)


# DINOv2 of torch.hub has no gradient checkpointing.
@parametrize([case for case in typical if case.library != "torch"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    # The gradients of attention are sums whose order, and float32 rounding, differ with a cache;
    # float64 tells that from an error.
    dtype = torch.float64 if case.on_attention else torch.float32
    batch = case.batch()
    model = case.patched(dtype).train()
    batch = batch.to(dtype) if case.modality == "image" else batch
    enable_checkpointing(case, model, reentrant)
    runs: list[bool] = []
    next(case.block(model).children()).register_forward_pre_hook(lambda *_: runs.append(True))
    loss, gradients = step(model, batch)
    assert len(runs) == 2  # the inside of the block did run again in the backward pass
    wanted_loss, wanted = step(case.patched(dtype).train(), batch)
    assert torch.equal(loss, wanted_loss)
    assert_same_gradients(gradients, wanted)


@typical_cases
def test_measuring(case: Case) -> None:
    """Looking at a patched model leaves it as it was, and sees what the patch writes."""
    model = case.patched()
    batch = case.batch()
    with untouched(model, batch):
        bs.detect(model, batch)
        seen = bs.calibrate(model, batch)
    if not case.on_values:
        return
    means = {site.mean for site in seen.at(LAYER) if site.channel == CHANNEL}
    left = see(case, model, batch).hidden[..., CHANNEL].abs().max()
    assert bool(means) == bool(left > 1000)


assert LENGTH > 4  # position 4, which the identity of `set_value` uses, exists
