"""Uses of the modes on attention that once gave wrong numbers or left something behind."""

from __future__ import annotations

import copy

import pytest
import torch

import biassurgery as bs
from tests.models import FAMILIES, planted, tokens
from tests.state import untouched


def padded(ids, padding):
    """The arguments for rows with padding on the left, without position ids."""
    ids = torch.cat([torch.full((len(ids), padding), 95), ids], 1)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transplant_counts_from_the_first_real_token(family):
    """Also where the mask comes without position ids: padding would put the tokens too far from
    k'.
    """
    model = planted(family)
    ids = tokens(2)
    wanted = model(ids, use_cache=False).logits[:, 1:]
    with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, tokens(3))):
        found = model(**padded(ids[:, 1:], 5)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_chunk_behind_a_cache_without_a_mask_sees_all_keys(family):
    """As flash attention gets it: no mask, more keys than queries, the last query sees the last
    key.
    """
    model = planted(family)
    ids = tokens(1)
    wanted = model(ids, use_cache=False).logits[:, 10:17]
    with bs.patched(model, "instrument"):
        model.config._attn_implementation_internal = "flash_attention_2"
        cache = model(ids[:, :10], use_cache=True).past_key_values
        found = model(ids[:, 10:17], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sinks_are_recorded_where_a_sink_cache_keeps_them():
    model = planted("llama")
    ids = tokens(1, 20)
    for sinks in (0, 2):
        cache = bs.SinkCache(model, 8, sinks=sinks)
        with bs.record(model, ("sink_mass", "probs")) as rec:
            for token in ids.split(1, 1):
                model(token, past_key_values=cache)
        for layer in range(5):
            first = rec["probs"][layer][..., 0] if sinks else torch.zeros(1, 4, 1)
            torch.testing.assert_close(rec["sink_mass"][layer], first, rtol=1e-5, atol=1e-6)
    assert rec["sink_mass"][0].sum() > 0


@torch.no_grad()
def test_a_token_named_twice_counts_once():
    model = planted("llama")
    with bs.record(model, "sink_mass", sink_tokens=(0, 0, 3)) as rec:
        model(tokens())
    with bs.record(model, "sink_mass", sink_tokens=(0, 3)) as once:
        model(tokens())
    assert torch.equal(rec["sink_mass"][2], once["sink_mass"][2])
    with pytest.raises(bs.BadOption, match="layers"):
        rec["sink_mass"][9]


def test_an_error_in_a_forward_leaves_nothing_on_the_attention(monkeypatch):
    model = bs.patch_model(planted("llama"), "attention_bias", kind="gate", std=1.0)
    projection = model.model.layers[2].self_attn.o_proj
    monkeypatch.setattr(projection, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    monkeypatch.undo()
    assert model.model.layers[2].self_attn.attention_input is None
    copy.deepcopy(model)


def test_a_key_that_dwarfs_the_others_does_not_hide_their_rotation():
    """bfloat16, a key bias of 300 in a channel that hardly turns."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
    )
    model = tf.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[7] = 300.0
    cache = bs.SinkCache(model.bfloat16(), 8, sinks=2)
    assert cache.layers[0].rotation.frequencies is not None


def test_the_transplanted_logit_is_capped_as_the_tokens_was():
    import transformers as tf

    config = tf.Gemma2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = tf.Gemma2ForCausalLM(config).eval()
    ids = tokens()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
        wanted = model(ids, use_cache=False).logits[:, 1:]
        with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, tokens(2))):
            torch.testing.assert_close(
                model(ids[:, 1:], use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4
            )


def test_what_cannot_train_is_refused():
    model = planted("llama")
    with untouched(model):
        for options in (
            {"kind": "off_by_one"},
            {"kind": "kv", "init": "zero_effect"},
            {"kind": "sink_logit", "init": "zero_effect"},
        ):
            with pytest.raises(bs.BadOption, match="trainable"):
                bs.patch_model(model, "attention_bias", trainable="bias", **options)


def test_unpatching_beside_lora_thaws_nothing():
    import peft

    model = bs.patch_model(planted("llama"), "attention_bias", trainable="bias")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainable = {
        name for name, p in adapted.named_parameters() if p.requires_grad and "bias" not in name
    }
    bs.unpatch_model(adapted)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trainable != set()


def test_measuring_takes_a_patch_that_needs_two_sequences():
    """The trial run for sinks is as many rows as `shuffle` needs."""
    model = planted("llama")
    sites = bs.calibrate(model, tokens())
    with bs.patched(model, "shuffle", sites=sites):
        assert bs.detect(model, tokens()).sinks is not None


@torch.no_grad()
def test_mpt_refuses_arguments_that_it_does_not_know():
    """A cache by a new name was once taken for nothing, and every step forgot the ones before
    it.
    """
    model = planted("mpt")
    ids = tokens(1)
    with bs.patched(model, "instrument"):
        attention = model.transformer.blocks[0].attn
        kept = attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "paging": ids}), with_kwargs=True
        )
        with pytest.raises(bs.UnsupportedModel, match="paging"):
            model(ids)
        kept.remove()
        model(ids)
