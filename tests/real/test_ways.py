"""In the ways people run a model: bfloat16, LoRA, int8 weights, caches, save and load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from tests.real import plain
from tests.real.conftest import Real

BLOCK = 11
CHANNEL = 507


def without_start(model: Any, real: Real) -> float:
    """How far the transplanted model's logits are from the model's own, of the largest."""
    ids = real.started(1, 32)
    wanted = plain.logits(model, ids)[:, 1:]
    found = bs.calibrate_key_values(model, ids[:, :8])
    with bs.patched(model, "transplant", key_values=found):
        transplanted = plain.logits(model, ids[:, 1:])
    assert torch.equal(plain.logits(model, ids)[:, 1:], wanted)
    return plain.relative(transplanted, wanted)


def test_cached_decoding_under_set_zero(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    """Token by token as at once: only the first step holds the value, and it is zeroed there."""
    ids = smollm2.evaluation[:1, :10]
    plainly = plain.logits(smollm2.model, ids)
    with bs.patched(smollm2.model, "set_zero", sites=smollm2_sites):
        wanted = plain.logits(smollm2.model, ids)
        with torch.no_grad():
            first = smollm2.model(ids[:, :1], use_cache=True)
            rest = [first.logits]
            for at in range(1, ids.shape[1]):
                step = smollm2.model(ids[:, at : at + 1], past_key_values=first.past_key_values)
                rest.append(step.logits)
    assert plain.relative(torch.cat(rest, 1), wanted) < 1e-4
    assert plain.relative(wanted, plainly) > 0.1


def test_left_padding_under_set_mean(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    """The value is found behind the padding: no position is told."""
    row = smollm2.evaluation[:1, :20]
    padded = torch.cat((torch.full((1, 4), 2), row), 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    for mode in ("set_mean", "set_zero"):
        with bs.patched(smollm2.model, mode, sites=smollm2_sites):
            alone = plain.logits(smollm2.model, row)
            found = plain.logits(smollm2.model, padded, attention_mask=mask)[:, 4:]
        assert plain.relative(found, alone) < 1e-4


def test_saved_and_loaded(smollm2: Real, smollm2_sites: bs.Sites, tmp_path: Path) -> None:
    ids = smollm2.evaluation[:1, :32]
    with bs.patched(smollm2.model, "set_mean", sites=smollm2_sites):
        wanted = plain.logits(smollm2.model, ids)
        bs.save_patch(smollm2.model, tmp_path)
    bs.load_patch(smollm2.model, tmp_path)
    assert torch.equal(plain.logits(smollm2.model, ids), wanted)
    bs.unpatch_model(smollm2.model)
    assert not torch.equal(plain.logits(smollm2.model, ids), wanted)


@pytest.mark.long
def test_bfloat16(smollm2: Real) -> None:
    """The values are there, and set_mean costs no more than bfloat16 itself."""
    model = copy.deepcopy(smollm2.model).to(torch.bfloat16)
    ids = smollm2.evaluation[:2]
    sites = bs.calibrate(model, smollm2.calibration[:4])
    assert {(site.layer, site.channel) for site in sites if site.first} >= {(BLOCK, CHANNEL)}
    original = plain.perplexity(model, ids)
    table = bs.compare(
        model, lambda host: bs.perplexity(host, ids), ["set_zero", "set_mean"], sites=sites
    )
    assert table["set_mean"] == pytest.approx(original, rel=0.02)
    assert table["set_zero"] > 1e4 * original
    assert without_start(model, smollm2) < 0.05


@pytest.mark.long
def test_lora(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plainly = plain.logits(smollm2.model, smollm2.evaluation[:1, :24])
    model: Any = get_peft_model(copy.deepcopy(smollm2.model), config).eval()
    ids = smollm2.evaluation[:1, :24]
    adapted = plain.logits(model, ids)
    assert plain.relative(adapted, plainly) > 0.01
    with bs.patched(model, "set_zero", sites=smollm2_sites):
        found = plain.logits(model, ids)
    base = model.base_model.model
    with plain.writing(base, BLOCK, {CHANNEL: 0.0, 247: 0.0}):
        assert plain.relative(found, plain.logits(model, ids)) < 1e-4
    assert torch.equal(plain.logits(model, ids), adapted)
    assert without_start(model, smollm2) < 1e-4


@pytest.mark.long
def test_int8_weights(smollm2: Real) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(smollm2.model)
    quantize_(model, Int8WeightOnlyConfig())
    ids = smollm2.evaluation[:1, :64]
    original = plain.logits(model, ids)
    assert plain.relative(original, plain.logits(smollm2.model, ids)) > 1e-5
    sites = bs.calibrate(model, smollm2.calibration[:4, :64])
    assert {(site.layer, site.channel) for site in sites if site.first} >= {(BLOCK, CHANNEL)}
    with bs.patched(model, "set_zero", sites=sites):
        found = plain.logits(model, ids)
    channels = {site.channel: 0.0 for site in sites if site.first}
    with plain.writing(model, BLOCK, channels):
        assert plain.relative(found, plain.logits(model, ids)) < 1e-3
    assert plain.relative(found, original) > 0.1
    assert without_start(model, smollm2) < 1e-3
