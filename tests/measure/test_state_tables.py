"""Tables 1 and 2 of a model, against sorting and statistics of float64 in plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible, LayerOutOfRange, NonFiniteActivation
from tests import models
from tests.checkpoints import tokenizer
from tests.state import untouched

tables_of = bs.evaluate.hidden_state_tables


def states(model, ids, layer, mask=None):
    """(N, T, D) float64: what the block returns, by a hook of its own."""
    seen = []
    block = model.model.layers[layer]
    hook = block.register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(ids, attention_mask=mask)
    hook.remove()
    return seen[0].double()


def test_the_tables_of_a_decoder_are_those_of_its_hidden_states():
    model = models.planted("llama")
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    with untouched(model, batches[0]):
        found = tables_of(model, batches, tokenizer=tokenizer(bos=True))
    assert found.layer == models.LAYER
    hidden = torch.cat([states(model, ids, found.layer) for ids in batches])
    rows = [sorted(row.abs().flatten().tolist(), reverse=True) for row in hidden]
    total = hidden[0].numel()
    wanted = {"top 1": 0, "top 3": 2, "top 100": 99, "median": total // 2 - 1}
    for rank, at in wanted.items():
        assert found.magnitudes[rank] == pytest.approx(statistics.fmean(r[at] for r in rows))
    for role, at in (("start", 0), ("elsewhere", 9)):
        values = hidden[:, at, models.CHANNEL].tolist()
        row = found.variation[f"massive, {role}"]
        assert (row.token, row.channel) == (None, models.CHANNEL)
        assert row.mean == pytest.approx(statistics.fmean(values))
        assert row.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-6)
    means = hidden.abs().mean(0).flatten()
    for rank, at in (("top 1", 0), ("top 2", 1), ("top 10 %", round(total / 10) - 1)):
        row = found.variation[rank]
        place = means.argsort(descending=True)[at].item()
        assert (row.token, row.channel) == divmod(place, models.HIDDEN)
        values = hidden[:, row.token, row.channel].tolist()
        assert row.mean == pytest.approx(statistics.fmean(values))
        assert row.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-6)
    assert [(c.text, c.positions, c.count) for c in found.carriers.rows] == [
        (tokenizer(bos=True).decode([models.DELIMITER_ID]), (9, 9), 8),
        (tokenizer(bos=True).decode([models.START_ID]), (0, 0), 8),
    ]
    assert found.variation.to_pandas().loc["massive, start", "channel"] == models.CHANNEL
    assert found.magnitudes.to_pandas().loc["top 1", "magnitude"] == found.magnitudes["top 1"]
    assert "massive, start" in str(found)


def test_padding_is_left_out_and_places_are_counted_from_the_start():
    model = models.planted("llama")
    ids = models.tokens(rows=2, length=20)
    short, whole = ids[:1, :14], ids[1:]
    padded = torch.cat([torch.full((1, 6), models.PAD_ID), short], 1)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    batch = {"input_ids": torch.cat([padded, whole]), "attention_mask": mask}
    found = tables_of(model, [batch], layer=2)
    apart = tables_of(model, [short, whole], layer=2)
    for row, other in zip(found.magnitudes.rows, apart.magnitudes.rows):
        assert row.magnitude == pytest.approx(other.magnitude, rel=1e-5)
    assert found.variation["massive, start"].mean == pytest.approx(models.START, rel=1e-3)
    first = found.variation["top 1"]
    assert (first.token, first.channel) == (9, models.CHANNEL)  # behind 6 of padding: column 15
    values = [states(model, row, 2)[0, 9, models.CHANNEL].item() for row in (short, whole)]
    assert first.mean == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert max(row.token or 0 for row in found.variation.rows) < 14


def test_images_go_by_their_positions():
    model = models.planted_vit()
    pictures = models.images(4)
    found = tables_of(model, [pictures])
    assert {int(row.text) for row in found.carriers.rows} == {1 + patch for patch in models.PATCHES}
    assert found.variation["massive, patch"].channel == models.CHANNEL
    outputs = []
    block = model.blocks[found.layer]
    hook = block.register_forward_hook(lambda _, __, out: outputs.append(out.double()))
    with torch.no_grad():
        model(pictures)
    hook.remove()
    largest = outputs[0].abs().flatten(1).amax(1).mean().item()
    assert found.magnitudes["top 1"] == pytest.approx(largest)


def test_values_on_both_sides_of_the_definition_count_with_their_sites():
    """The gate of a site takes all values of its channel, the definition the largest alone."""
    model = models.planted("llama")
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    sites = bs.calibrate(model, batches)
    strict = {"min_magnitude": models.START + 1000}
    (alone,) = tables_of(model, batches, 1, **strict).carriers.rows
    assert alone.token_id == models.DELIMITER_ID
    found = tables_of(model, batches, 1, sites=sites, **strict)
    assert {row.token_id for row in found.carriers.rows} == {models.DELIMITER_ID, models.START_ID}
    for site in sites.at(1):
        row = found.variation[f"massive, {site.role}"]
        assert row.mean == pytest.approx(site.mean, rel=1e-4)
        assert row.variance**0.5 == pytest.approx(site.std, rel=1e-3, abs=1e-2)
    with pytest.raises(Incompatible, match="sites: "):
        tables_of(models.planted_vit(), models.images(2), sites=sites)


def test_one_sequence_of_one_token():
    found = tables_of(models.planted("llama"), models.tokens(rows=1, length=1, delimiter_at=None))
    assert found.variation is None
    assert found.sequences == 1
    assert found.magnitudes["top 1"] > 0


def test_what_cannot_be_made_a_table_of():
    model = models.planted("llama")
    with pytest.raises(LayerOutOfRange, match="layers: 9"):
        tables_of(model, models.tokens(), layer=9)
    with pytest.raises(BadOption, match="layer: "):
        tables_of(model, models.tokens(), layer=[0, 1])
    with pytest.raises(BadOption, match="tokenizer: a str"):
        tables_of(model, models.tokens(), tokenizer="gpt2")
    with pytest.raises(BadOption, match="tokenizer: "):
        tables_of(models.planted_vit(), models.images(2), tokenizer=tokenizer(bos=True))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(NonFiniteActivation, match="block 1 holds NaN"):
        tables_of(model, models.tokens(), layer=1)
