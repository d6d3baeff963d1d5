"""SinkCache against dense attention written out by hand, in float64 and over several times the
window.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import biassurgery as bs
from biassurgery.errors import BadOption
from biassurgery.modes import AttentionBias, Transplant
from biassurgery.streaming.cache import SinkCache
from biassurgery.surgery.positions import ShiftEdit
from tests.models import planted, tokens
from tests.streaming.streams import (
    MOVABLE,
    OLD,
    SINKS,
    WINDOW,
    by_hand,
    kept,
    off,
    random_llama,
    stream,
    words,
)

PATHS = {"gpt_neox": "gpt_neox", "falcon": "transformer", "mpt": "transformer"}
LISTS = {"falcon": "h", "mpt": "blocks"}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def one_layer(family: str) -> Any:
    """A planted model with its first block only: its keys depend on their token alone, so a fresh
    run on the kept tokens is the truth.
    """
    model = planted(family)
    parent = model.get_submodule(PATHS.get(family, "model"))
    name = LISTS.get(family, "layers")
    setattr(parent, name, nn.ModuleList(list(getattr(parent, name))[:1]))
    setattr(model.config, "n_layers" if family == "mpt" else "num_hidden_layers", 1)
    return model


# Numbers


@pytest.mark.parametrize("sinks", [0, 1, SINKS])
def test_a_stream_as_computed_by_hand(sinks: int) -> None:
    model = random_llama()
    ids = words(3, 6 * WINDOW)
    cache = SinkCache(model, WINDOW, sinks, attention_mask=torch.ones(3, 1))
    truth = by_hand(model, ids, WINDOW, sinks)
    found = stream(model, ids, cache)
    assert off(found, truth) < 1e-5
    whole = model(ids).logits
    assert off(found[:, :WINDOW], whole[:, :WINDOW]) < 1e-6
    assert off(found[:, WINDOW:], whole[:, WINDOW:]) > 0.05  # eviction matters
    assert (
        off(found[:, WINDOW:], by_hand(model, ids, WINDOW, sinks + 1)[:, WINDOW:]) > 0.05
    )  # and so does what is kept


@pytest.mark.parametrize("family", MOVABLE)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_one_layer_is_a_fresh_run_on_the_kept_tokens(family: str, sinks: int) -> None:
    model = one_layer(family)
    ids = tokens(2, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW, sinks, attention_mask=torch.ones(2, 1)))
    for at in (0, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 3 * WINDOW - 1):
        assert off(found[:, at], model(kept(ids, at, WINDOW, sinks)).logits[:, -1]) < 1e-4, at


@pytest.mark.parametrize("family", MOVABLE)
def test_until_the_first_eviction_all_is_as_with_a_dynamic_cache(family: str) -> None:
    model = planted(family)
    ids = tokens(2, WINDOW)
    ours = SinkCache(model, WINDOW, attention_mask=torch.ones(2, 1))
    theirs = DynamicCache()
    for chunk in ids.split([5, 4, 1, 1, 1], 1):
        wanted = model(chunk, past_key_values=theirs, use_cache=True).logits
        assert torch.equal(model(chunk, past_key_values=ours, use_cache=True).logits, wanted)
    assert ours.get_seq_length() == WINDOW


def test_a_prompt_in_one_chunk_is_the_prompt_token_by_token() -> None:
    model = random_llama()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    first = model(ids[:, :WINDOW], past_key_values=cache).logits
    found = torch.cat((first, stream(model, ids[:, WINDOW:], cache)), 1)
    assert off(found, stream(model, ids, SinkCache(model, WINDOW))) < 1e-6


def test_nothing_drifts() -> None:
    model = one_layer("llama")
    ids = tokens(1, 1500, delimiter_at=None)
    cache = SinkCache(model, 6, 2)
    for at in range(1500):
        last = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
    assert off(last, model(kept(ids, 1499, 6, 2)).logits[:, -1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = random_llama().to(dtype)
    ids = words(1, 5 * WINDOW)
    cache = SinkCache(model, WINDOW)
    assert (
        off(stream(model, ids, cache).double(), by_hand(model.double(), ids, WINDOW, SINKS)) < 0.2
    )
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.dtype == dtype


def test_positions_may_be_shifted() -> None:
    model = random_llama()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    wanted = stream(model, ids, SinkCache(model, WINDOW))
    edit = ShiftEdit(1, ("position_ids", 1))
    edit.attach(model.model.rotary_emb)
    assert off(stream(model, ids, cache), wanted) < 1e-5
    assert off(stream(model, ids, SinkCache(model, WINDOW)), wanted) < 1e-5


@pytest.mark.parametrize("transplant", [False, True])
def test_a_cache_for_a_model_with_explicit_biases(transplant: bool) -> None:
    model = planted("llama")
    ids = tokens(1, WINDOW)
    key_values = bs.calibrate_key_values(model, [tokens()])
    bs.patch_model(model, Transplant(key_values) if transplant else AttentionBias("kv", "normal"))
    theirs = stream(model, ids[:, 1:], DynamicCache())
    assert torch.equal(stream(model, ids[:, 1:], SinkCache(model, WINDOW)), theirs)


# The object


def test_copies_are_independent() -> None:
    model = random_llama()
    ids = words(1, 40)
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :20], cache)
    copies = (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)))
    wanted = stream(model, ids[:, 20:], cache)
    for other in copies:
        assert other.get_seq_length() == 20
        assert torch.equal(stream(model, ids[:, 20:], other), wanted)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert off(stream(model, ids, cache)[:, 20:], wanted) < 1e-9


def test_what_it_says_of_itself() -> None:
    model = random_llama()
    cache: Any = SinkCache(model, WINDOW, 2)
    stream(model, words(1, 30), cache)
    assert len(cache) == 2
    for layer in (0, 1):
        assert cache.get_seq_length(layer) == 30
        assert cache.layers[layer].keys.shape[2] == cache.layers[layer].values.shape[2] == WINDOW
        assert (cache.get_max_cache_shape(layer) if OLD else cache.get_max_length(layer)) == WINDOW
    assert cache.is_sliding == [False, False]
    assert not cache.is_compileable
    with pytest.raises(BadOption, match="crop: "):
        cache.crop(-1)


def test_making_one_leaves_the_model_as_it_was() -> None:
    model = random_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    SinkCache(model, WINDOW)
    assert model.training
    assert model.model.layers[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
