"""Where nothing meets the definition, what stands out is told, with the definition that finds it.

The oracle plants a value by hand: a channel at [CLS] far above the median, but below 100.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import biassurgery as bs
from tests.models import CHANNEL, LAYER, START_ID, planted, tokens
from tests.stepped import outputs, stepped

VALUE = 60.0


def small() -> torch.nn.Module:
    """A value of about `VALUE` at the start token of every sequence, medians of about 0.5."""
    return stepped({(1, START_ID, 20): VALUE})


def test_what_stands_out_is_told_and_found_as_advised() -> None:
    model = small()
    ids = tokens(6, 20, 1, None)
    found = bs.detect(model, [ids])
    assert len(found.sites) == 0
    hint = found.standing_out
    assert hint is not None
    states = outputs(model, ids)[hint.layer].abs()
    assert (hint.channel, hint.role, hint.count) == (20, "start", 6)
    assert hint.mean == pytest.approx(states[:, 0, 20].mean().item(), rel=1e-5)
    medians = states.flatten(1).sort(1).values
    middle = medians[:, (medians.shape[1] - 1) // 2].mean().item()
    assert hint.median == pytest.approx(middle, rel=1e-5)
    assert hint.ratio > 30
    assert f"channel 20 stands out at start (block {hint.layer})" in found.summary[1]
    magnitude, ratio = hint.definition
    assert f"min_magnitude={magnitude:g}, min_ratio={ratio:g}" in found.summary[3]
    again = bs.detect(model, [ids], min_magnitude=magnitude, min_ratio=ratio)
    assert (hint.layer, 20, "start") in {(s.layer, s.channel, s.role) for s in again.sites}
    assert again.standing_out is None


def test_nothing_stands_out_in_a_random_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    found = bs.detect(LlamaForCausalLM(config).eval(), [tokens(6, 20, 1, None)])
    assert found.standing_out is None
    assert found.summary[0].startswith("massive: none: no magnitude is above 100 and above 1000")
    assert found.summary[1] == "where: nowhere"


def test_massive_activations_need_no_hint() -> None:
    found = bs.detect(planted("llama"), [tokens()])
    assert found.standing_out is None
    assert f"channel {CHANNEL} in blocks {LAYER} to" in found.summary[0]
