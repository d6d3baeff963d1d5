"""`onload="blocks"`: the forwards that verify and confirm, beside the data, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import NonFiniteActivation, UnsupportedModel
from biassurgery.measure.confirm import _Left
from biassurgery.measure.transplanted import Trial
from biassurgery.surgery.block import hidden_of
from tests import models
from tests.census.tiny import tiny_model
from tests.measure.killing import bits


def model_of(family: str) -> Any:
    if family in models.FAMILIES:
        return models.planted(family)
    torch.manual_seed(0)
    return tiny_model(family).eval()


def batches() -> list[Tensor]:
    return [5 + models.tokens(rows=1 + seed, seed=seed) % 50 for seed in range(2)]


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """What the model has returned in each trial: with the start token and without, then parts."""
    seen: list[list[Tensor]] = []
    check = Trial.check

    def watching(self: Any, with_token: Any, without: Any, *parts: Any) -> None:
        outputs = [with_token, without, *(output for some in parts for output in some)]
        seen.append([hidden_of(output).clone() for output in outputs])
        check(self, with_token, without, *parts)

    monkeypatch.setattr(Trial, "check", watching)
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi", "gemma3_text"])
def test_the_trial_of_a_transplant(outputs: list[list[Tensor]], family: str) -> None:
    """Rotations, learned positions, ALiBi, sliding windows; padding, and a cache that goes on."""
    model = model_of(family)
    found = bs.calibrate_key_values(model, batches())
    assert bits(bs.calibrate_key_values(model, batches(), onload="blocks")) == bits(found)
    ordinarily, by_blocks = outputs
    assert len(by_blocks) == len(ordinarily) == 8
    assert all(map(torch.equal, by_blocks, ordinarily))
    assert not torch.equal(by_blocks[0][:, 1:], by_blocks[1])  # not the same computation


@pytest.mark.filterwarnings("ignore")
def test_a_start_token_that_acts_through_more() -> None:
    model = model_of("doge")
    reasons = []
    ways: tuple[Any, ...] = (None, "blocks")
    for onload in ways:
        with pytest.raises(UnsupportedModel, match="acts through more than its keys and") as error:
            bs.calibrate_key_values(model, batches(), onload=onload)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


def with_more_writers(model: Any) -> Any:
    """A planted LLaMA, in whose later blocks single weights write more, into other channels.

    In each of them one unit reads the channel that the start token alone has.
    """
    ids = models.tokens(rows=1)
    for layer, channel, value in ((3, 31, 20_000.0), (4, 23, 90_000.0)):
        mlp = models.blocks(model, "llama")[layer].mlp
        read: list[Tensor] = []
        down = mlp.down_proj
        handle = down.register_forward_pre_hook(lambda _, args, to=read: to.append(args[0]))
        with torch.no_grad():
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight[5] = 0
                linear.weight[5, models.KEYS[models.START_ID]] = 1e5
            model(ids)
            handle.remove()
            assert read[0][0, 0, 5] > 1
            down.weight[:, 5] = 0
            down.weight[channel, 5] = value / read[0][0, 0, 5]
    return model


def test_super_weights_of_several_blocks() -> None:
    """Those of later blocks take the places of earlier ones among the first."""
    model = with_more_writers(models.planted("llama"))
    data = [models.tokens(rows=2, length=40, seed=seed) for seed in range(2)]
    found = bs.diagnose(model, data)
    layers = [weight.layer for weight in found.super_weights]
    assert layers[:2] == [4, 3]
    assert min(layers) < 3
    losses = [weight.loss for weight in found.super_weights]
    assert None not in losses[:2]
    assert losses[0] != losses[1]
    assert found.sinks is not None
    assert found.sinks.evicted is not None
    assert bits(bs.diagnose(model, data, onload="blocks")) == bits(found)


@pytest.mark.parametrize("length", [12, 40])
def test_short_texts_and_long_ones(length: int) -> None:
    data = models.tokens(rows=2, length=length)
    found = bs.diagnose(models.planted("llama"), data)
    assert bool(found.sinks and found.sinks.reason) is (length < 16)
    assert bits(bs.diagnose(models.planted("llama"), data, onload="blocks")) == bits(found)


def test_sites_that_cannot_be_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that are not finite under the patch: the rest is confirmed without it."""
    see = _Left.see

    def overflowing(self: Any, output: Any) -> None:
        see(self, output)
        if output.layer == 4:
            raise NonFiniteActivation("hidden states are not finite")

    monkeypatch.setattr(_Left, "see", overflowing)
    found = []
    ways: tuple[Any, ...] = (None, "blocks")
    for onload in ways:
        with pytest.warns(UserWarning, match="with its massive values set to zero"):
            of_this_way = bs.diagnose(models.planted("llama"), models.tokens(), onload=onload)
        found.append(bits(of_this_way))
    assert found[0] == found[1]
