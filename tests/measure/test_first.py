"""`layers="first"`: where massive values are born and where they grow, on models that add up."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.errors import FileError
from tests import models
from tests.models import DELIMITER_ID, START_ID
from tests.state import output_of
from tests.stepped import counted_rows, outputs, places, standing, stepped

A, B = 20, 30  # channels

# What the blocks add, and the places (layer, channel) that "first" must change, by hand: of each
# channel the first block, and every one at which a value is beyond the definition on top of what it
# was at the last of them. 1000 medians are about 100, 200, 250, 350 and 420 at the five blocks.
GROWTHS = {
    "born once": ({(1, START_ID, A): 3000.0}, {(1, A)}),
    "two channels": (
        {(0, START_ID, A): 500.0, (3, DELIMITER_ID, B): -900.0},
        {(0, A), (3, B)},
    ),
    "built up": (
        {(1, START_ID, A): 10_000.0, (2, START_ID, A): 24_000.0, (4, START_ID, A): 60_000.0},
        {(1, A), (2, A), (4, A)},
    ),
    "grown little": ({(1, START_ID, A): 3000.0, (3, START_ID, A): 80.0}, {(1, A)}),
    "grown little by little": (
        {
            (1, START_ID, A): 3000.0,
            (2, START_ID, A): 150.0,
            (3, START_ID, A): 250.0,  # 400 since block 1
            (4, START_ID, A): 100.0,  # on top of that
        },
        {(1, A), (3, A)},
    ),
    "grown by less than half the gate": (
        {(0, START_ID, A): 50_000.0, (2, START_ID, A): 400.0},
        {(0, A), (2, A)},
    ),
    "turned": ({(1, START_ID, A): 3000.0, (3, START_ID, A): -6000.0}, {(1, A), (3, A)}),
    "another token of the channel later, at the same level": (
        {(1, START_ID, A): 3000.0, (3, DELIMITER_ID, A): 3000.0},
        {(1, A), (3, A)},
    ),
    "born on two tokens at once": (
        {(2, START_ID, A): 3000.0, (2, DELIMITER_ID, A): 9000.0, (2, DELIMITER_ID, B): 700.0},
        {(2, A), (2, B)},
    ),
}


def data(seed=1, rows=4):
    return models.tokens(rows, 16, seed, delimiter_at=9)


@pytest.mark.parametrize(("steps", "wanted"), GROWTHS.values(), ids=GROWTHS)
def test_set_zero_leaves_nothing_that_meets_the_definition(steps, wanted):
    model = stepped(steps)
    sites = bs.calibrate(model, [data(1), data(2)])
    assert {(layer, channel) for layer, channel, _ in standing(model, data(1))} == places(sites)
    assert {(s.layer, s.channel) for s in sites if s.first} == wanted
    ids = data(9)
    before = output_of(model, ids)
    for layers in (None, "first"):
        with bs.patched(model, "set_zero", sites=sites, layers=layers):
            assert places(bs.patches(model)[0].sites) == wanted
            assert bs.patches(model)[0].layers == tuple(sorted({layer for layer, _ in wanted}))
            assert standing(model, ids) == []
    assert torch.equal(output_of(model, ids), before)


@pytest.mark.parametrize(("steps", "wanted"), GROWTHS.values(), ids=GROWTHS)
def test_set_mean_leaves_everything_as_it_is(steps, wanted):
    model = stepped(steps)
    sites = bs.calibrate(model, data())
    plain = outputs(model, data(9))
    with bs.patched(model, "set_mean", sites=sites):
        for layer, (after, before) in enumerate(zip(outputs(model, data(9)), plain, strict=True)):
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4, msg=f"block {layer}")


def test_tokens_in_sequences_of_their_own():
    """No sequence shows that the delimiter's value is born later than the start token's."""
    steps = {(1, START_ID, A): 3000.0, (3, DELIMITER_ID, A): 3000.0}
    model = stepped(steps)
    plain, delimiters = models.tokens(2, 16, 1, None), models.tokens(2, 16, 2, None)
    delimiters[:, 0] = 5
    delimiters[:, 7] = DELIMITER_ID
    for batches in ([plain, delimiters], [delimiters, plain], [torch.cat([plain, delimiters])]):
        sites = bs.calibrate(model, batches)
        assert {(s.layer, s.channel) for s in sites if s.first} == {(1, A), (3, A)}
        with bs.patched(model, "set_zero", sites=sites):
            assert standing(model, torch.cat([plain, delimiters])) == []


def test_a_value_that_the_model_makes_again_is_found_by_the_run_under_the_patch():
    """Block 3 writes the value where it is missing, which no run without a patch can show."""
    model = stepped({(1, START_ID, A): 3000.0}, remade={(3, START_ID, A): 700.0})
    sites = bs.calibrate(model, data())
    assert {round(s.mean) for s in sites} == {3000}
    assert {(s.layer, s.channel) for s in sites if s.first} == {(1, A), (3, A)}
    gate = next(s.gate for s in sites.at(3))
    assert gate < 700  # at 3000 / 4 it would miss what has been made again
    with bs.patched(model, "set_zero", sites=sites):
        assert standing(model, data(9)) == []
    with bs.patched(model, "set_zero", sites=sites, layers=1):
        assert standing(model, data(9)) == [(3, A, 700.0), (4, A, 700.0)]


def test_what_is_left_standing_where_no_site_is_is_told(tmp_path):
    """Block 3 takes the value back, whether it is there or not, as SmolLM2's block 28 does."""
    model = stepped({(1, START_ID, A): 3000.0, (3, START_ID, A): -3000.0})
    sites = bs.calibrate(model, data())
    assert {layer for layer, _ in places(sites)} == {1, 2}
    with bs.patched(model, "set_zero", sites=sites):
        assert bs.patches(model)[0].layers == (1,)
        left = standing(model, data())
    assert {(layer, channel) for layer, channel, _ in left} == {(3, A), (4, A)}
    assert sites.left_standing() == {
        (layer, channel): pytest.approx(largest, rel=1e-3) for layer, channel, largest in left
    }
    assert "set_zero leaves values" in str(sites)
    named = "layer 3, channel 20 (3,000); layer 4, channel 20 (3,000)"
    assert named in " ".join(str(sites).split())
    more = bs.calibrate(model, data(5))
    assert set((sites + more).left_standing()) == set(sites.left_standing())
    sites.save(tmp_path / "sites.safetensors")
    loaded = bs.Sites.load(tmp_path / "sites.safetensors")
    assert loaded.left_standing() == sites.left_standing()
    whole = bs.calibrate(stepped({(1, START_ID, A): 3000.0}), data())
    assert whole.left_standing() == {}
    assert "set_zero leaves" not in str(whole)


def test_the_definition_is_that_of_the_calibration():
    model = stepped({(1, START_ID, A): 3000.0, (3, START_ID, A): 400.0})
    for least, wanted in ((100.0, {(1, A), (3, A)}), (500.0, {(1, A)})):
        sites = bs.calibrate(model, data(), min_magnitude=least)
        assert {(s.layer, s.channel) for s in sites if s.first} == wanted
        assert bs.detect(model, data(), min_magnitude=least).sites == sites


def test_a_vision_transformer_is_patched_at_one_block():
    model = models.planted_vit()
    sites = bs.calibrate(model, models.images(6))
    assert {(s.layer, s.channel) for s in sites if s.first} == {(models.LAYER, models.CHANNEL)}


# -- what it costs


def test_a_stream_is_read_once_and_a_few_sequences_run_again():
    model = stepped(GROWTHS["built up"][0])
    batches = [data(seed, rows=3) for seed in range(5)]
    with counted_rows(model) as rows:
        streamed = bs.calibrate(model, iter(batches))
    assert rows[:5] == [3] * 5
    assert len(rows) == 6
    assert rows[5] == 2  # every sequence shows all there is; two, for `shuffle` may be on the model
    assert streamed == bs.calibrate(model, batches)


def test_the_sequences_that_run_again_hold_all_kinds_of_massive_activations():
    """Each of the first rows shows one kind, the last shows two of those again."""
    steps = {(1, START_ID, A): 3000.0, (2, DELIMITER_ID, B): 3000.0}
    ids = models.tokens(6, 16, 3, None)
    ids[1:, 0] = 5
    ids[4, 7] = DELIMITER_ID
    model = stepped(steps, remade={(3, DELIMITER_ID, B): 600.0})
    with counted_rows(model) as rows:
        sites = bs.calibrate(model, [ids, ids[1:3]])
    assert rows == [6, 2, 2]
    assert (3, B) in {(s.layer, s.channel) for s in sites if s.first}


def test_a_model_that_overflows_without_its_massive_values_is_measured_all_the_same():
    """What block 3 makes again is beyond float16."""
    steps = {(1, START_ID, A): 3000.0}
    model = stepped(steps, remade={(3, START_ID, A): 7e4}).half()
    with pytest.warns(UserWarning, match="not finite"):
        sites = bs.calibrate(model, data())
    assert {(s.layer, s.channel) for s in sites if s.first} == {(1, A)}
    assert {round(s.mean) for s in sites} == {3000}


def test_nothing_runs_again_where_nothing_is_massive():
    model = stepped({(1, START_ID, A): 3000.0})
    with counted_rows(model) as rows:
        assert len(bs.calibrate(model, models.tokens(4, 16, 1, None)[:, 1:])) == 0
    assert rows == [4]


# -- sums, files, and what earlier versions wrote


@pytest.mark.parametrize(("steps", "wanted"), GROWTHS.values(), ids=GROWTHS)
def test_sums_and_files_know_it(steps, wanted, tmp_path):
    model = stepped(steps)
    whole = bs.calibrate(model, [data(1), data(2)])
    parts = bs.calibrate(model, data(1)), bs.calibrate(model, data(2))
    for total in (parts[0] + parts[1], parts[1] + parts[0]):
        assert places(bs.Sites(s for s in total if s.first)) == wanted
        assert [s.gate for s in total] == pytest.approx([s.gate for s in whole], rel=1e-6)
    whole.save(tmp_path / "sites.safetensors")
    loaded = bs.Sites.load(tmp_path / "sites.safetensors")
    assert loaded == whole
    assert loaded + parts[0] == whole + parts[0]


def test_only_the_start_of_the_sites_that_are_left_counts_when_blocks_are_left_out():
    model = stepped(GROWTHS["built up"][0])
    sites = bs.calibrate(model, data())
    later = bs.Sites([s for s in sites if s.layer >= 3], origin=sites.origin)
    with bs.patched(model, "set_zero", sites=later):
        assert bs.patches(model)[0].layers == (3, 4)


@pytest.mark.parametrize("gate", [None, 100.0])
def test_sites_of_which_it_is_not_known_go_by_their_means_and_gates(gate):
    """Hand-made, or of a file of an earlier version: a mean that is further from all of its role at
    the last block than the gate has grown.
    """
    made = [
        bs.Site(1, A, "start", 3000.0, gate=gate),
        bs.Site(2, A, "start", 3050.0, gate=gate),
        bs.Site(3, A, "start", 9000.0, gate=gate),
        bs.Site(3, B, "elsewhere", -800.0, gate=gate),
        bs.Site(4, B, "elsewhere", -850.0, gate=gate),
        bs.Site(4, B, "start", -850.0, gate=gate),
    ]
    model = stepped({(1, START_ID, A): 3000.0})
    for sites in (bs.Sites(made), bs.Sites(reversed(made))):
        with bs.patched(model, "set_zero", sites=sites):
            wanted = {(1, A), (3, A), (3, B), (4, B)}
            assert places(bs.patches(model)[0].sites) == wanted


def test_published_sites_are_at_one_layer_each():
    for name in ("meta-llama/Llama-2-7b-hf", "openai-community/gpt2"):
        sites = bs.Sites.published(name)
        assert all(site.first is None for site in sites)
        assert len(sites.layers()) == 1


def without_growth(path):
    """Turn a file of sites into what earlier versions wrote: they knew nothing of growth."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["biassurgery.sites"])
    for site in header["sites"]:
        del site["first"], site["spans"]
    tensors = {n: t for n, t in tensors.items() if n not in ("grown", "growth")}
    save_file(tensors, path, {"biassurgery.sites": json.dumps(header)})


def test_a_file_of_an_earlier_version(tmp_path):
    """It patches by means and gates, and whatever it is added to is not known either."""
    steps, wanted = GROWTHS["built up"]
    model = stepped(steps)
    fresh = bs.calibrate(model, data(1))
    path = tmp_path / "sites.safetensors"
    fresh.save(path)
    without_growth(path)
    old = bs.Sites.load(path)
    assert [(s.layer, s.channel, s.mean) for s in old] == [
        (s.layer, s.channel, s.mean) for s in fresh
    ]
    for sites in (old, old + fresh, bs.calibrate(model, data(2), resume=old)):
        assert {site.first for site in sites} == {None}
        with bs.patched(model, "set_zero", sites=sites):
            assert places(bs.patches(model)[0].sites) == wanted
            assert standing(model, data(9)) == []
    (old + fresh).save(path)
    assert bs.Sites.load(path) == old + fresh


@pytest.mark.parametrize("tensors", [{"growth"}, {"grown"}])
def test_a_file_with_half_of_it_is_refused(tensors, tmp_path):
    path = tmp_path / "sites.safetensors"
    bs.calibrate(stepped(GROWTHS["built up"][0]), data()).save(path)
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in tensors:
        kept[name] = kept[name][:-1]
    save_file(kept, path, metadata)
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)
