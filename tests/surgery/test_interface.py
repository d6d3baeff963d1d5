"""Attention functions that are not transformers' own: refused, and never replaced in silence."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests import models
from tests.state import output_of, untouched

IDS = models.tokens(rows=2)
KEY_VALUES = bs.calibrate_key_values(models.planted("llama"), IDS)


def tempered(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
    """What a user adds: attention whose logits are halved."""
    return sdpa_attention_forward(module, query * 0.5, key, value, mask, **others)


AttentionInterface.register("tempered", tempered)
AttentionMaskInterface.register("tempered", sdpa_mask)


def with_implementation(name: str) -> Any:
    model = models.planted("llama")
    model.set_attn_implementation(name)
    return model


@pytest.fixture
def _sdpa_is_wrapped() -> Iterator[None]:
    """Another library's function under the name of transformers' own, as kvpress does it."""

    @functools.wraps(sdpa_attention_forward)
    def pressed(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = pressed
    yield
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own


SDPA = r"set_attn_implementation\('sdpa'\) first"
ELSEWHERE = "a process that does not import what did so"


def refused(model: Any, way_out: str = SDPA) -> None:
    """Everything on attention is, with this as the way out, and leaves the model as it was."""
    with untouched(model, IDS):
        for action in (
            lambda: bs.patch_model(model, "instrument"),
            lambda: bs.patch_model(model, "attention_bias", kind="kv", init="zero_effect"),
            lambda: bs.patch_model(model, "transplant", key_values=KEY_VALUES),
            lambda: bs.record(model, "sink_mass").__enter__(),
            lambda: bs.calibrate_key_values(model, IDS),
        ):
            with pytest.raises(UnsupportedModel, match=f"in its place. .*{way_out}"):
                action()


def test_a_function_of_a_users_own() -> None:
    model = with_implementation("tempered")
    plain = output_of(models.planted("llama"), IDS)
    assert (output_of(model, IDS) - plain).abs().max() > 1e-3  # it does compute something else
    refused(model)


@pytest.mark.usefixtures("_sdpa_is_wrapped")
def test_a_function_under_the_name_of_transformers_own() -> None:
    refused(with_implementation("sdpa"), ELSEWHERE)


def test_an_eager_function_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.eager_attention_forward
    replaced = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    model = with_implementation("eager")
    with bs.patched(model, "instrument"):
        output_of(model, IDS)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", replaced)
    refused(model)


def test_a_function_that_is_set_after_the_patch() -> None:
    model = models.planted("llama")
    bs.patch_model(model, "instrument")
    model.set_attn_implementation("tempered")
    with pytest.raises(UnsupportedModel, match="tempered"):
        output_of(model, IDS)
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, IDS), output_of(with_implementation("tempered"), IDS))


def test_what_does_not_touch_attention_is_served() -> None:
    model = with_implementation("tempered")
    sites = bs.calibrate(model, IDS)
    assert {site.channel for site in sites} == {models.CHANNEL}
    before = output_of(model, IDS)
    with bs.patched(model, "set_zero", sites=sites):
        assert not torch.equal(output_of(model, IDS), before)
    detection = bs.detect(model, IDS)
    assert detection.sinks is None
    assert "tempered" in detection.no_sinks


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_transformers_own_functions_are_served(name: str) -> None:
    model = with_implementation(name)
    before = output_of(model, IDS)
    with bs.patched(model, "instrument"):
        assert (output_of(model, IDS) - before).abs().max() < 1e-5 * before.abs().max()


def test_the_config_of_a_patched_attention_is_the_models() -> None:
    """What is set on either is seen by both, but for the name of the implementation."""
    model = models.planted("llama")
    before = output_of(model, IDS)
    attention = model.model.layers[1].self_attn
    with untouched(model, IDS), bs.patched(model, "instrument"):
        model.config.noted = 3
        assert attention.config.noted == 3
        attention.config.noted = 4
        assert model.config.noted == 4
        del model.config.noted
        assert not hasattr(attention.config, "noted")
        assert attention.config._attn_implementation != model.config._attn_implementation
        assert attention.config.to_dict() == model.config.to_dict()
    bs.patch_model(model, "instrument")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.config.noted = 5
        assert twin.model.layers[1].self_attn.config.noted == 5
        assert not hasattr(model.config, "noted")
        torch.testing.assert_close(output_of(twin, IDS), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sdpa", "bound"])
def test_transformers_own_function_with_something_bound_to_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is bound (here: not causal) changes what it computes, under any name."""
    bound = functools.partial(sdpa_attention_forward, is_causal=False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, bound)
    model = models.planted("llama")
    plain = output_of(model, IDS)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name
    refused(model, ELSEWHERE if name == "sdpa" else SDPA)
    if name == "bound":
        assert not torch.allclose(output_of(model, IDS), plain)


def test_transformers_functions_under_each_others_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention under the name of sdpa gets no mask, and then sees what is behind it."""
    model = models.planted("llama")
    causal = output_of(model, IDS)
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", eager)
    plain = output_of(model, IDS)
    assert (plain - causal).abs().max() > 0.1
    with bs.patched(model, "instrument"):
        torch.testing.assert_close(output_of(model, IDS), plain, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    with bs.patched(model, "instrument"):
        torch.testing.assert_close(output_of(model, IDS), causal, rtol=1e-4, atol=1e-4)


def test_torchs_own_function_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of quantised attention put theirs in its place."""
    own = torch.nn.functional.scaled_dot_product_attention

    def other(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return own(q, k, 2 * v, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other)
    refused(models.planted("llama"), "Put torch's own back first")
