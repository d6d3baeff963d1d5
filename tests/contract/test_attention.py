"""What a model with a patch on its attention computes: nothing new, or its definition."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadOption
from biassurgery.surgery import attention as edited
from tests.contract.bias_oracle import Biases, biases_of, written_out
from tests.contract.cases import ATTENTION, PARAMETERS, TYPICAL, Case, attention_cases, parametrize
from tests.contract.running import Seen, assert_near, default_dtype_of, distance, logits_of, see
from tests.models import LAYERS
from tests.state import output_of

BIASES = parametrize([case for case in ATTENTION if case.mode == "attention_bias"])
SAME = 3e-5  # two orders of computing the same float32 numbers
EXACT = 1e-11  # the same in float64
# fraction of the largest logit by which the biases of the battery move the logits at least
EFFECT = 0.01


def neutral(case: Case, model: Any) -> Any:
    """The mode applied in a way that should change nothing."""
    return case.patch(model, **({"init": "zero_effect"} if case.mode == "attention_bias" else {}))


def without_start(case: Case, batch: Tensor) -> Tensor:
    return batch[:, 1:] if case.mode == "transplant" else batch


def from_start(case: Case, seen: Seen) -> Seen:
    return Seen(seen.hidden[:, 1:], seen.logits[:, 1:]) if case.mode == "transplant" else seen


# `off_by_one` cannot be without effect.
@parametrize([case for case in ATTENTION if case.variant != "attention_bias off_by_one"])
def test_identity(case: Case) -> None:
    """Watched, with a bias of zero effect, or transplanted, a model computes what it did."""
    batch = case.batch()
    found = see(case, neutral(case, case.model()), without_start(case, batch))
    wanted = from_start(case, see(case, case.model(), batch))
    assert_near(found.hidden, wanted.hidden, SAME)
    assert_near(found.logits, wanted.logits, SAME)
    if case.mode == "transplant":
        assert (found.logits - wanted.logits).abs().max() < 1e-4


def dense(case: Case, biases: Biases, batch: Tensor, dtype: torch.dtype = torch.float64) -> Seen:
    """One run of an unpatched model whose attention is written out."""
    model = case.model(dtype)
    with written_out(case, model, biases):
        return see(case, model, batch)


@attention_cases
def test_effect(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, the patched model equals the unpatched one with its biases written out.

    All of it is patched.
    """
    batch = case.batch().to(torch.float64) if case.modality == "image" else case.batch()
    calls: list[int] = []
    original = edited.attend
    monkeypatch.setattr(
        edited, "attend", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    model = case.patched(torch.float64)
    plain = see(case, case.model(torch.float64), batch)
    if case.mode == "transplant":
        found = see(case, model, batch[:, 1:])
        wanted = from_start(case, plain)
        unlike = see(case, case.model(torch.float64), batch[:, 1:])  # the token is missed
    else:
        found = see(case, model, batch)
        wanted = dense(case, biases_of(case, model), batch)
        unlike = plain
    assert len(calls) == LAYERS
    tolerance = 1e-5 if case.mode == "transplant" else EXACT  # key values are float32
    assert_near(found.hidden, wanted.hidden, tolerance)
    assert_near(found.logits, wanted.logits, tolerance)
    assert (distance(found.logits, unlike.logits) > EFFECT) == (case.mode != "instrument")


@BIASES
def test_parameters(case: Case) -> None:
    """Those of its kind on every attention, in the dtype of the layer, and no others.

    With the library's default spread.
    """
    kind = case.variant.removeprefix("attention_bias ")
    model = case.patch(
        case.model(torch.bfloat16), **({} if kind == "off_by_one" else {"std": 0.02})
    )
    for bias in biases_of(case, model):
        assert tuple(bias) == PARAMETERS.get(kind, ())
        assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in bias.values())
        assert all(
            0.01 < p.float().square().mean().sqrt() < 0.04 for p in bias.values() if p.numel() > 16
        )


@attention_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(case: Case, dtype: torch.dtype) -> None:
    batch = case.batch().to(dtype) if case.modality == "image" else case.batch()
    assert_as_near(
        case, case.model(dtype), case.patched(dtype), batch, {torch.float32: SAME}.get(dtype, 0.01)
    )


@attention_cases
def test_autocast(case: Case) -> None:
    batch = case.batch()
    plain = case.model()
    patched = case.patched()
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_near(case, plain, patched, batch, 0.01)
        found = see(case, patched, batch)
    assert not torch.equal(found.logits, see(case, patched, batch).logits)  # autocast was on


def first_attention(case: Case, model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention of the first layer returned, and the logits.

    No rounding has grown yet there.
    """
    seen: list[Tensor] = []
    attention, projection = case.attentions(model)[0]
    # nn.MultiheadAttention does not call its own projection.
    module = attention if case.family == "open_clip_vision" else projection
    handle = module.register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    logits = see(case, model, batch).logits
    handle.remove()
    return seen[0], logits


def assert_as_near(case: Case, plain: Any, patched: Any, batch: Tensor, tolerance: float) -> None:
    """A patched attention in low precision is as near to float64 as an unpatched one.

    One in that precision whose softmax is float64.
    """
    exact = case.model(torch.float64)
    double = batch.double() if case.modality == "image" else batch
    biases = biases_of(case, patched) if case.mode == "attention_bias" else None
    with (
        torch.autocast("cpu", enabled=False),
        written_out(case, exact, biases) if biases else nullcontext(),
    ):
        wanted = first_attention(case, exact, double)[0]
    with written_out(case, plain, biases) if biases else nullcontext():
        reference, logits = first_attention(case, plain, batch)
    found, found_logits = first_attention(case, patched, without_start(case, batch))
    if case.mode == "transplant":
        wanted = wanted[:, 1:]
        reference = reference[:, 1:]
    assert (found.dtype, found_logits.dtype) == (reference.dtype, logits.dtype)
    assert found_logits.isfinite().all()
    assert distance(found.double(), wanted) < 2 * distance(reference.double(), wanted) + tolerance


@attention_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_after_patching(case: Case, dtype: torch.dtype) -> None:
    """A patched model that is cast equals a cast model that is patched."""
    batch = case.batch()
    low = batch.to(dtype) if batch.is_floating_point() else batch
    assert torch.equal(
        see(case, case.patched().to(dtype), low).logits, see(case, case.patched(dtype), low).logits
    )


def gradients(case: Case, model: Any, wanted: list[Tensor]) -> list[Tensor]:
    batch = case.batch().double() if case.modality == "image" else case.batch()
    with default_dtype_of(model):
        output = logits_of(model(batch))
    loss = (
        output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


@BIASES
def test_backward(case: Case) -> None:
    """Gradients of every parameter, old and new, are those of the attention that is written out."""
    model = case.patched(torch.float64)
    plain = case.model(torch.float64)
    biases = biases_of(case, model)
    leaves = [
        {name: p.detach().clone().requires_grad_() for name, p in bias.items()} for bias in biases
    ]
    own = dict(model.named_parameters())
    names = [name for name, _ in plain.named_parameters()]
    found = gradients(
        case, model, [own[name] for name in names] + [p for bias in biases for p in bias.values()]
    )
    with written_out(case, plain, leaves):
        wanted = gradients(
            case, plain, list(plain.parameters()) + [p for bias in leaves for p in bias.values()]
        )
    assert len(found) == len(wanted)
    for gradient, truth in zip(found, wanted):
        assert (gradient is None) == (truth is None)
        if truth is not None:
            assert_gradients_near(gradient, truth)
    for added in found[len(names) :]:
        assert added.abs().max() > 0


def assert_gradients_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=1e-6, atol=1e-8 * max(1.0, wanted.abs().max().item())
    )


@parametrize(
    [
        case
        for case in ATTENTION
        if case.mode == "attention_bias" and "off_by_one" not in case.variant
    ]
)
def test_training_the_bias_only(case: Case) -> None:
    """`trainable="bias"` freezes what was trainable, until the patch is gone.

    What was frozen before stays so.
    """
    model = case.model()
    names = [name for name, _ in model.named_parameters()]
    frozen = dict(model.named_parameters())[names[0]].requires_grad_(False)
    case.patch(model, trainable="bias")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {
        id(p) for bias in biases_of(case, model) for p in bias.values()
    }
    logits_of(model(case.batch())).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with pytest.raises(BadOption, match="trainable"):
        bs.patch_model(
            model,
            "attention_bias",
            kind="gate" if "gate" not in case.variant else "v",
            trainable="bias",
        )
    bs.unpatch_model(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == names[:1]
    assert not frozen.requires_grad


@parametrize([case for case in ATTENTION if case.variant in TYPICAL])
def test_stack(case: Case) -> None:
    """Beside a patch on activations: the same in any order, and each can leave first."""
    batch = case.batch()
    model = case.model()
    zero = Case(case.family, "set_zero")
    alone = output_of(case.patched(), batch)
    zeroed = output_of(zero.patched(), batch)
    both = output_of(zero.patch(case.patched()), batch)
    assert not torch.equal(both, alone)
    assert case.mode == "instrument" or not torch.equal(both, zeroed)
    for first, second, left in ((case, zero, zeroed), (zero, case, alone)):
        second.patch(first.patch(model))
        assert torch.equal(output_of(model, batch), both)
        bs.unpatch_model(model, first.mode)
        assert torch.equal(output_of(model, batch), left)
        bs.unpatch_model(model)
        assert torch.equal(output_of(model, batch), output_of(case.model(), batch))


@parametrize(
    [
        case
        for case in ATTENTION
        if case.modality == "text"
        and case.variant != "attention_bias off_by_one"
        and not case.family.startswith("falcon")
    ]
)
def test_eager_host(case: Case) -> None:
    """An eager host computes the same, and still returns its probabilities.

    Of the keys, without the share of the bias.
    """
    batch = case.batch()
    model = case.model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(batch, output_attentions=True)
    neutral(case, model)
    with torch.no_grad():
        found = model(without_start(case, batch), output_attentions=True)
    first = 1 if case.mode == "transplant" else 0
    assert_near(found.logits, plain.logits[:, first:], SAME)
    if case.family == "mpt":  # MPT of transformers returns no probabilities here
        return
    assert len(found.attentions) == LAYERS
    for probs, plain_probs in zip(found.attentions, plain.attentions):
        plain_probs = plain_probs[:, :, first:, first:]
        torch.testing.assert_close(probs, plain_probs, rtol=1e-4, atol=1e-5)
