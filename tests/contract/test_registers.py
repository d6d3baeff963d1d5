"""What a model with fixed registers computes: exactly the fill at the input of every block.

And the model's own arithmetic from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from tests import models, vision
from tests.contract.cases import REGISTERS, Case, parametrize, register_cases
from tests.contract.running import distance, logits_of, see

EFFECT = 1e-3  # fraction of the largest logit by which other registers move the logits at least


def recorded(case: Case, model: Any, batch: Tensor) -> list[Tensor]:
    """The input (B, T, D) of every block, as the block itself sees it."""
    with bs.record(model, what="block_input") as rec:
        see(case, model, batch)
    return [rec["block_input"][layer] for layer in range(models.LAYERS)]


@contextmanager
def rewritten(case: Case, model: Any, new: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """An unpatched model whose blocks are given other registers, by plain hooks.

    `new(layer, registers)` (B, R, D).
    """

    def swap(layer: int, _: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[:, case.registers()] = new(layer, args[0][:, case.registers()])
        return (hidden, *args[1:])

    with ExitStack() as undo:
        for layer, block in enumerate(vision.blocks(model, case.family)):
            undo.callback(block.register_forward_pre_hook(partial(swap, layer)).remove)
        yield


def means_of(case: Case) -> bs.RegisterMeans:
    means = case.arguments()["means"]
    assert tuple(means.values.shape) == (models.LAYERS, len(case.registers()), models.HIDDEN)
    return means


@register_cases
def test_effect(case: Case) -> None:
    """At every block the registers are what the fill says, all other tokens the block's own.

    The logits follow from them.
    """
    batch = case.batch(3)
    plain = case.model()
    before = see(case, plain, batch)
    after = see(case, case.patched(), batch)
    inputs = recorded(case, case.patched(), batch)
    means = means_of(case)
    at = case.registers()
    given = [hidden[:, at] for hidden in inputs]
    fill = case.variant.split()[1]
    for layer, found in enumerate(given):
        mean = means.values[layer]  # type: ignore[index]
        std = means.std[layer]  # type: ignore[index]
        if fill == "mean":
            assert torch.equal(found, mean.expand_as(found))
        if fill == "zero":
            assert not found.any()
        if fill == "noise":
            assert ((found - mean).abs() <= 6 * std + 1e-6).all()
            assert layer == 0 or not torch.equal(found[0], found[1])
    with rewritten(case, plain, lambda layer, _: given[layer]):
        wanted = see(case, plain, batch)
    assert torch.equal(after.hidden, wanted.hidden)
    assert torch.equal(after.logits, wanted.logits)
    moved = distance(after.logits, before.logits)
    assert moved > EFFECT if fill == "zero" else moved > 0


@parametrize([case for case in REGISTERS if case.variant.endswith("mean")])
def test_calibration(case: Case) -> None:
    """Means and standard deviations are those of float64 arithmetic on what plain hooks see.

    Two halves add up to the whole.
    """
    model = case.model()
    images = models.images(6, seed=3)
    seen = {}
    at = case.registers()

    def see_input(layer: int, _: Any, args: Any) -> None:
        seen[layer] = args[0][:, : at[-1] + 1].double()

    hooks = [
        block.register_forward_pre_hook(partial(see_input, layer))
        for layer, block in enumerate(vision.blocks(model, case.family))
    ]
    see(case, model, images)
    for hook in hooks:
        hook.remove()
    whole = torch.stack([seen[layer] for layer in range(models.LAYERS)])  # (layers, B, prefix, D)
    found = bs.calibrate_registers(model, list(images.split(4)))
    halves = bs.calibrate_registers(model, images[:2]) + bs.calibrate_registers(model, images[2:])
    for means in (found, halves):
        torch.testing.assert_close(
            means.values.double(), whole[:, :, at].mean(1), rtol=1e-5, atol=1e-6
        )
        std = whole[:, :, at].std(1, correction=0)
        assert means.std is not None
        assert means.cls is not None
        torch.testing.assert_close(means.std.double(), std, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(means.cls.double(), whole[:, :, 0].mean(1), rtol=1e-5, atol=1e-6)
        assert means.count == 6


@register_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(case: Case, dtype: torch.dtype) -> None:
    batch = case.batch(3).to(dtype)
    model = case.patched(dtype)
    inputs = recorded(case, model, batch)
    mean = means_of(case).values
    assert all(hidden.dtype == dtype for hidden in inputs)
    if "mean" in case.variant:
        for layer, hidden in enumerate(inputs):
            assert torch.equal(hidden[:, case.registers()], mean[layer].to(dtype).expand(3, -1, -1))
    assert see(case, model, batch).logits.isfinite().all()
    cast_after = case.patched().to(dtype)
    assert torch.equal(see(case, cast_after, batch).logits, see(case, model, batch).logits)


@register_cases
def test_autocast(case: Case) -> None:
    batch = case.batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = recorded(case, case.patched(), batch)
        plain = case.model()
        with rewritten(case, plain, lambda layer, _: inputs[layer][:, case.registers()]):
            wanted = see(case, plain, batch)
        assert torch.equal(see(case, case.patched(), batch).logits, wanted.logits)


@register_cases
def test_backward(case: Case) -> None:
    """No gradient flows through a register that became a constant.

    What is shuffled brings that of the image which it came from.
    """
    batch = case.batch(3)
    fill = case.variant.split()[1]
    model = case.patched()
    plain = case.model()
    given = [hidden[:, case.registers()] for hidden in recorded(case, case.patched(), batch)]

    def new(layer: int, own: Tensor) -> Tensor:
        if fill != "shuffle":
            return given[layer]
        donor = [
            next(
                d for d in range(3) if d != row and torch.equal(own[d].detach(), given[layer][row])
            )
            for row in range(3)
        ]
        return own[donor]

    def gradients(target: Any) -> dict[str, Tensor | None]:
        torch.manual_seed(123)
        output = logits_of(target(batch))
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        return {name: p.grad for name, p in target.named_parameters()}

    found = gradients(model)
    with rewritten(case, plain, new):
        wanted = gradients(plain)
    for name, gradient in found.items():
        other = wanted[name]
        assert (gradient is None or not gradient.any()) == (other is None or not other.any()), name
        if gradient is not None and other is not None:
            torch.testing.assert_close(
                gradient, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item())
            )
    tokens = next(
        gradient
        for name, gradient in found.items()
        if "register_tokens" in name or "reg_token" in name
    )
    assert fill == "shuffle" or tokens is None or not tokens.any()


@register_cases
def test_chosen_registers_and_cls(case: Case) -> None:
    """`registers=` leaves the others alone; `cls=True` takes [CLS] as well."""
    batch = case.batch(3)
    at = case.registers()
    inputs = recorded(case, case.patch(case.model(), registers=[1], cls=True, layers=[2]), batch)
    plain = recorded(case, case.model(), batch)
    changed = [
        sorted({token for token in range(a.shape[1]) if not torch.equal(a[:, token], b[:, token])})
        for a, b in zip(inputs, plain)
    ]
    assert changed[:2] == [[], []]
    assert changed[2] == [0, at[1]]
