"""The life of a massive activation, against hooks and dense attention in float64."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, Incompatible, NonFiniteActivation, NoSites
from tests import models
from tests.measure.test_channels import outputs
from tests.state import untouched
from tests.written_out_attention import dense

life_of = bs.evaluate.value_life


def check(model, ids, life, at):
    """All numbers of a life whose value is at one position of each row."""
    states = outputs(model, ids)[..., models.CHANNEL]  # (L, N, T)
    calls = dense(model, ids)
    usual = states[life.site.layer].abs() <= life.site.gate
    for block in life.blocks:
        values = states[block.layer, :, at].tolist()
        assert block.value == pytest.approx(statistics.fmean(values), rel=1e-5, abs=1e-6)
        assert block.std == pytest.approx(statistics.pstdev(values), rel=1e-4, abs=1e-4)
        others = states[block.layer].abs()[usual].mean().item()
        assert block.ordinary == pytest.approx(others, rel=1e-5)
        shares = calls[block.layer].probs[:, :, at + 1 :, at].mean((0, 2))
        assert block.attention == pytest.approx(shares.mean().item(), rel=1e-4)
        assert block.strongest == pytest.approx(shares.max().item(), rel=1e-4)


def test_the_start_token_and_the_delimiter():
    model = models.planted("llama")
    ids = models.tokens()
    diagnosis = bs.diagnose(model, [ids])
    for role, at in (("start", 0), ("elsewhere", 9)):
        site = next(s for s in diagnosis.sites if s.role == role and s.first)
        with untouched(model, ids):
            life = life_of(model, [ids[:3], ids[3:]], diagnosis, site)
        assert (life.carriers, life.sequences, life.site) == (4, 4, site)
        check(model, ids, life, at)
        assert {weight.row for weight in life.weights} == {models.CHANNEL}
        assert f"model.layers.{models.LAYER}.mlp.down_proj" in str(life)
    largest = life_of(model, [ids], diagnosis)
    assert largest.site.role == "elsewhere"
    assert list(largest.to_pandas().index) == list(range(models.LAYERS))


def test_behind_a_start_token_and_left_padding():
    model = models.planted("llama")
    ids = models.tokens()
    diagnosis = bs.diagnose(model, [ids])
    site = next(s for s in diagnosis.sites if s.role == "start" and s.first)
    plain = life_of(model, [ids], diagnosis, site)
    behind = life_of(model, [ids[:, 1:]], diagnosis, site, start=models.START_ID)
    padded = torch.nn.functional.pad(ids, (3, 0), value=models.PAD_ID)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    left = life_of(model, [{"input_ids": padded, "attention_mask": mask}], diagnosis, site)
    assert behind.blocks == plain.blocks
    for one, other in zip(left.blocks, plain.blocks):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-4)
        assert one.attention == pytest.approx(other.attention, rel=1e-3)


def test_a_vision_transformer():
    model = models.planted_vit()
    pictures = models.images(3)
    life = life_of(model, [pictures], bs.diagnose(model, [pictures]))
    assert life.site.role == "patch"
    assert life.blocks[models.LAYER].value == pytest.approx(models.START, rel=0.3)
    assert all(0 < block.attention < 1 for block in life.blocks)


def test_what_has_no_life():
    model = models.planted("llama")
    ids = models.tokens()
    nothing = bs.diagnose(model, [ids], min_ratio=1e9)
    with pytest.raises(NoSites, match="diagnosis: it found no massive"):
        life_of(model, [ids], nothing)
    found = bs.diagnose(model, [ids])
    ordinary = models.tokens(delimiter_at=None)[:, 1:]
    with pytest.raises(BadBatch, match="no sequence has the value"):
        life_of(model, [ordinary], found)
    with pytest.raises(Incompatible, match="diagnosis: "):
        life_of(models.planted_vit(), [models.images(2)], found)


def test_sites_and_values_that_cannot_be_followed():
    model = models.planted("llama")
    ids = models.tokens()
    diagnosis = bs.diagnose(model, [ids])
    with pytest.raises(BadOption, match=r"^site: .*layer=99.* none of diagnosis\.sites"):
        life_of(model, ids, diagnosis, replace(diagnosis.sites[0], layer=99))
    broken = copy.deepcopy(model)
    broken.model.layers[3].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteActivation, match=r"output of block 4 .* in channel 7"):
        life_of(broken, ids, diagnosis)
