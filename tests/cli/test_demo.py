"""The packaged checkpoint: its massive activation is there, matters, and is a constant. Oracles are
plain forward passes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from biassurgery.cli.demo import Demo, load_demo_model, run_demo
from biassurgery.data.packaged import packaged_text, text_batches

ROOT = Path(__file__).resolve().parents[2]
CHANNEL = 34


@pytest.fixture(scope="module")
def demo() -> Demo:
    return run_demo()


@torch.no_grad()
def loss_with(value: float | None) -> float:
    """Mean loss on the evaluation text, with the start token's channel overwritten at block 0 by a
    hook.
    """
    model, tokenizer = load_demo_model()

    def write(module, args, output):
        output = output.clone()
        output[:, 0, CHANNEL] = value
        return output

    if value is not None:
        model.model.layers[0].register_forward_hook(write)
    total = 0.0
    count = 0
    for batch in text_batches(tokenizer, packaged_text("evaluation"), 32):
        logits = model(batch, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        total -= logits.gather(-1, batch[:, 1:, None]).sum().item()
        count += batch[:, 1:].numel()
    return total / count


def test_the_massive_activation_is_found_where_it_is(demo: Demo) -> None:
    first = demo.detection.sites.at(0)
    assert [(site.channel, site.role) for site in first] == [(CHANNEL, "start")]
    assert first[0].std < 1e-3
    assert first[0].margin is not None
    assert first[0].margin > 20
    assert demo.detection.layers[0].ratio > 300


def test_it_matters_and_its_mean_is_enough(demo: Demo) -> None:
    mean = demo.detection.sites[0].mean
    wanted = {"original": loss_with(None), "set_zero": loss_with(0.0), "set_mean": loss_with(mean)}
    for mode, loss in wanted.items():
        assert demo.comparison[mode]["loss"] == pytest.approx(loss, rel=1e-5)
    assert wanted["set_zero"] > wanted["original"] + 1.0
    assert wanted["set_mean"] == pytest.approx(wanted["original"], abs=1e-4)
    assert demo.comparison["zero_random"]["loss"] == pytest.approx(wanted["original"], abs=0.02)
    assert demo.comparison["original"]["perplexity"] == pytest.approx(
        math.exp(wanted["original"]), rel=1e-4
    )


def test_the_log_tells_of_this_checkpoint(demo: Demo) -> None:
    log = [
        json.loads(line)
        for line in (ROOT / "training" / "training_log.jsonl").read_text().splitlines()
    ]
    model, _ = load_demo_model()
    assert log[0]["parameters"] == sum(p.numel() for p in model.parameters())
    step = next(line for line in log if line.get("step") == 13_000)
    assert step["massive_channel"] == CHANNEL
    assert step["blocks"][0]["top"][0] == pytest.approx(-demo.detection.sites[0].mean, rel=0.01)
    assert log[1]["blocks"][0]["top"][0] < 1  # at initialisation there was none
