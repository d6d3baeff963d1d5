"""`start=` of verbs that measure, against the same token written by hand in front."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.errors import FileError, Incompatible
from tests.models import DELIMITER_ID, LAYER, PAD_ID, START_ID, planted, tokens

S = START_ID


def words(rows: int = 4, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Sequences that begin with any word."""
    return tokens(rows, length + 1, seed)[:, 1:]


def by_hand(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(ids[:, :1], S), ids], 1)


def padded(ids: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """The first rows behind `count` tokens of padding, cut on the right."""
    pads = torch.full((len(ids), count), PAD_ID)
    mask = torch.ones_like(ids)
    mask[:, :count] = 0
    return {"input_ids": torch.cat([pads, ids], 1)[:, : ids.shape[1]], "attention_mask": mask}


BATCHES = [words(4), words(3, seed=2)]


def test_sites_are_those_of_batches_by_hand() -> None:
    model = planted("llama")
    sites = bs.calibrate(model, BATCHES, start=S)
    wanted = bs.calibrate(model, [by_hand(batch) for batch in BATCHES])
    assert list(sites) == list(wanted)
    assert {site.role for site in sites} == {"start", "elsewhere"}
    assert sites.tally.tokens == wanted.tally.tokens == 7 * 21
    assert (sites.origin.start, wanted.origin.start) == (S, None)
    assert sites.origin.start_token == wanted.origin.start_token == S
    without = bs.calibrate(model, BATCHES)
    assert {site.role for site in without} == {"elsewhere"}  # there is no start token to be massive


def test_detections_are_those_of_batches_by_hand() -> None:
    model = planted("gpt2")
    found = bs.detect(model, BATCHES, start=S)
    wanted = bs.detect(model, [by_hand(batch) for batch in BATCHES])
    assert (found.layers, list(found.sites)) == (wanted.layers, list(wanted.sites))
    assert found.positions == wanted.positions
    assert found.sinks is not None
    assert wanted.sinks is not None
    for layer, same in zip(found.sinks.layers, wanted.sinks.layers):
        assert layer.attention == same.attention
    assert found.sites.origin.start == S


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi"])
def test_key_values_are_those_of_batches_by_hand(family: str) -> None:
    model = planted(family)
    batches = [*BATCHES, padded(words(2, seed=5), 4)]
    found = bs.calibrate_key_values(model, batches, start=S)
    hand = by_hand(words(2, seed=5))
    mask = torch.ones_like(hand)
    wanted = bs.calibrate_key_values(
        model, [*map(by_hand, BATCHES), {"input_ids": hand[:, :17], "attention_mask": mask[:, :17]}]
    )
    assert found.keys.equal(wanted.keys)
    assert found.values.equal(wanted.values)
    assert (found.spread, found.count, found.start, wanted.start) == (0.0, 9, S, None)
    assert bs.calibrate_key_values(model, batches).spread > 0.1


def test_which_tokens_sequences_began_with(tmp_path: Path) -> None:
    model = planted("llama")
    constant = bs.calibrate(model, tokens())
    assert constant.origin.starts == (START_ID,)
    assert constant.origin.start_token == START_ID
    ids = tokens(12)
    ids[:, 0] = torch.arange(40, 28, -1)
    varying = bs.calibrate(model, ids)
    assert varying.origin.starts == tuple(range(29, 37))  # the smallest few
    assert varying.origin.start_token is None
    for sites in (constant, varying):
        sites.save(tmp_path / "sites")
        again = bs.Sites.load(tmp_path / "sites")
        assert (again, again.tally.starts) == (sites, sites.origin.starts)
        assert sites[:1].origin.starts == sites.origin.starts
    both = constant + varying
    assert both.origin.starts == (START_ID, *range(29, 36))
    assert both == varying + constant == bs.calibrate(model, [tokens(), ids])
    embeddings = model.get_input_embeddings()(tokens()).detach()
    unknown = bs.calibrate(model, {"inputs_embeds": embeddings})
    assert unknown.origin.starts == ()
    assert (constant + unknown).origin.starts == ()


def test_a_padded_row_and_a_packed_one_have_their_own_starts() -> None:
    ids = tokens(2, 12)
    ids[:, 0] = PAD_ID
    ids[:, 1] = 7
    packed = torch.arange(12).repeat(2, 1)
    packed[:, 6:] -= 6
    ids[:, 6] = 9
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": packed}
    assert bs.calibrate(planted("llama"), batch).origin.starts == (7, 9)


def test_measurements_with_another_start_do_not_add_up() -> None:
    model = planted("llama")
    with_start = bs.calibrate(model, BATCHES, start=S)
    with pytest.raises(Incompatible, match="start is 0 on the left and None on the right"):
        with_start + bs.calibrate(model, BATCHES)
    with pytest.raises(Incompatible, match="start is"):
        bs.calibrate(model, BATCHES, resume=with_start)
    more = bs.calibrate(model, BATCHES[:1], start=S, resume=with_start)
    assert more.tally.sequences == 11
    key_values = bs.calibrate_key_values(model, BATCHES, start=S)
    assert (key_values + key_values).start == S
    with pytest.raises(Incompatible, match="start is"):
        key_values + bs.calibrate_key_values(model, BATCHES)


def test_key_values_remember_their_start(tmp_path: Path) -> None:
    model = planted("llama")
    key_values = bs.calibrate_key_values(model, BATCHES, start=S)
    key_values.save(tmp_path / "kv")
    assert bs.KeyValues.load(tmp_path / "kv").start == S
    bs.patch_model(model, "transplant", key_values=key_values)
    bs.save_patch(model, tmp_path / "patch")
    other = planted("llama")
    bs.load_patch(other, tmp_path / "patch")
    assert bs.patches(other)[0].mode.key_values.start == S


@pytest.mark.parametrize("verb", [bs.calibrate, bs.detect, bs.calibrate_key_values, bs.perplexity])
def test_a_checkpoint_is_of_one_start(verb: Any, tmp_path: Path) -> None:
    model = planted("llama")
    verb(model, BATCHES, start=S, checkpoint=tmp_path / "kept")
    with pytest.raises(FileError, match="start 0 there, 5 here"):
        verb(model, BATCHES, start=5, checkpoint=tmp_path / "kept")
    with pytest.raises(FileError, match="start 0 there, None here"):
        verb(model, BATCHES, checkpoint=tmp_path / "kept")
    again = verb(model, BATCHES, start=S, checkpoint=tmp_path / "kept")
    wanted = verb(model, BATCHES, start=S)
    if isinstance(again, bs.Sites):
        assert again == wanted  # the start tokens that were seen as well
    elif isinstance(again, float):
        assert again == wanted


def varying(model: nn.Module) -> torch.Tensor:
    """Words 2 and 3 made starts of 1.0 and 1.1 times the value; sequences that begin with them."""
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[2] = table[START_ID]
        table[3] = 1.1 * table[START_ID]
    ids = tokens(6)
    ids[ids == 2] = ids[ids == 3] = 4
    ids[:, 0] = torch.tensor([2, 3] * 3)
    return ids


def test_set_mean_says_that_the_start_varies_and_by_how_much() -> None:
    model = planted("llama")
    ids = varying(model)
    sites = bs.calibrate(model, ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][:, 0]
    (start,) = [site for site in sites.at(LAYER) if site.role == "start"]
    values = states[:, start.channel]
    assert start.std > 0.01 * start.mean
    with pytest.warns(UserWarning, match="start token is not a constant") as told:
        bs.patch_model(model, "set_mean", sites=sites)
    (warning,) = told
    assert warning.filename == __file__
    said = f"{values.mean():,.6g} +- {values.std(correction=0):,.3g}"
    assert said in str(warning.message)
    assert f"({values.std(correction=0) / values.mean():.1%})" in str(warning.message)
    assert "calibrate(model, batches, start=...)" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bs.patched(model, "set_zero", sites=sites):
            pass
        delimiters = [site for site in sites if site.role == "elsewhere"]
        bs.unpatch_model(model)
        behind = bs.calibrate(model, ids[:, 1:], start=2)
        assert behind.origin.start_token == 2
        bs.patch_model(model, "set_mean", sites=behind)
        bs.unpatch_model(model)
        if delimiters:
            bs.patch_model(model, "set_mean", sites=bs.Sites(delimiters, origin=sites.origin))


def test_how_much_keys_and_values_vary_by_layer() -> None:
    model = planted("llama")
    ids = varying(model)
    key_values = bs.calibrate_key_values(model, ids)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for layer, spread in enumerate(key_values.spread_by_layer):
        ratios = []
        for name in ("keys", "values"):
            at_start = getattr(cache.layers[layer], name)[:, :, 0].double()
            deviation = at_start - at_start.mean(0)
            ratios.append((deviation.square().mean() / at_start.mean(0).square().mean()).sqrt())
        assert spread == pytest.approx(max(ratios).item(), rel=1e-3)
    with pytest.warns(UserWarning, match="start token is not a constant") as told:
        bs.patch_model(model, "transplant", key_values=key_values)
    (warning,) = told
    assert warning.filename == __file__
    assert f"in layer {max(range(5), key=key_values.spread_by_layer.__getitem__)}" in str(
        warning.message
    )
    assert bs.calibrate_key_values(planted("llama"), tokens()).spread_by_layer == (0.0,) * 5


def test_only_start_tokens_are_run() -> None:
    """Of a causal model; one sequence is run as a whole, to see whether key and value suffice."""
    model = planted("llama")
    read = []
    hook = model.model.layers[2].register_forward_hook(
        lambda module, given, out: read.append(tuple(given[0].shape[:2]))
    )
    bs.calibrate_key_values(model, [tokens(1, 10), *(tokens(5, 60, seed) for seed in range(4))])
    hook.remove()
    assert read[-5:] == [(1, 1)] * 5  # it is one token
    assert max(rows * length for rows, length in read) < 60


def test_start_tokens_of_padded_and_packed_rows() -> None:
    """Against the keys that the model's cache holds of each document by itself."""
    model = planted("llama")
    packed = tokens(2, 16, seed=3)
    packed[:, 0] = torch.tensor([5, 6])
    packed[:, 10] = torch.tensor([7, DELIMITER_ID])
    positions = torch.cat([torch.arange(10), torch.arange(6)]).repeat(2, 1)
    left = padded(words(2, 16, seed=6), 3)
    batches = [{"input_ids": packed, "position_ids": positions}, left]
    found = bs.calibrate_key_values(model, batches)
    starts = [*packed[:, 0].tolist(), *packed[:, 10].tolist(), *left["input_ids"][:, 3].tolist()]
    with torch.no_grad():
        caches = [model(torch.tensor([[start, 9, 9]])).past_key_values for start in starts]
    for layer in range(5):
        keys = torch.cat([cache.layers[layer].keys[:, :, 0] for cache in caches])
        torch.testing.assert_close(found.keys[layer], keys.mean(0), rtol=1e-5, atol=1e-5)
        std = keys.double().std(0, correction=0).float()
        torch.testing.assert_close(found.key_std[layer], std, rtol=1e-4, atol=1e-5)
    assert found.count == 6
