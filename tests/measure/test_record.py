"""`record` against the softmax of every attention written out in float64, and against plain
hooks.
"""

from __future__ import annotations

import copy

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.contract.running import cache_name
from tests.measure.recorded import ABOUT_ATTENTION, ATTENTION, check, near, recorded, split
from tests.models import (
    CHANNEL,
    FAMILIES,
    HEADS,
    LAYER,
    LAYERS,
    PAD_ID,
    blocks,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.written_out_attention import Dense, dense

SDPA = tuple(family for family in FAMILIES if family != "mpt")  # MPT has no such attention


@pytest.mark.parametrize("family", SDPA)
def test_prefill(family):
    model = planted(family)
    ids = tokens(rows=2, length=12)
    check(
        recorded(model, ABOUT_ATTENTION, ids, use_cache=False),
        dense(model, ids, use_cache=False),
        0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_hosts_return_the_same_weights(family):
    model = planted(family)
    ids = tokens(rows=2, length=12)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    eager = type(model)(config).eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = eager(ids, use_cache=False, output_attentions=True).attentions
    rec = recorded(
        eager, ("logits", "probs", "sink_mass", "value_updates", "v"), ids, use_cache=False
    )
    for layer, weights in enumerate(truth):
        values = rec["v"][layer].double().repeat_interleave(HEADS // rec["v"][layer].shape[1], 1)
        near(rec["probs"][layer], weights)
        near(rec["logits"][layer].softmax(-1), weights)
        assert (rec["logits"][layer] == -torch.inf).equal(
            ~torch.ones(12, 12, dtype=torch.bool).tril().expand_as(weights)
        )
        near(rec["sink_mass"][layer], weights[..., 0])
        near(rec["value_updates"][layer][0], weights[..., :1].double() @ values[:, :, :1], 2e-4)
        near(rec["value_updates"][layer][1], weights[..., 1:].double() @ values[:, :, 1:], 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_hooks_see(family):
    """Also with a patch that changes block outputs, and under `instrument`."""
    model = planted(family)
    ids = tokens(rows=2)
    names = ("block_input", "block_output", "norm_output", "attention_output")
    plain = recorded(model, "block_output", ids, use_cache=False)["block_output"][LAYERS - 1]
    bs.patch_model(model, "set_zero", sites=bs.calibrate(model, [ids]))
    bs.patch_model(model, "instrument")
    rec = recorded(model, names, ids, use_cache=False)
    seen = {name: [] for name in names}

    def see(name, place):
        return lambda module, args, kwargs, output: seen[name].append(
            (args or (kwargs["hidden_states"],))[0]
            if place == "input"
            else output
            if torch.is_tensor(output)
            else output[0]
        )

    for block in blocks(model, family):
        attention = block.get_submodule(ATTENTION.get(family, "self_attn"))
        for module, kind in ((block, "block"), (attention, "attention")):
            for place in ("input", "output"):
                name = (
                    "norm_output" if (kind, place) == ("attention", "input") else f"{kind}_{place}"
                )
                module.register_forward_hook(see(name, place), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    for name in names:
        assert len(seen[name]) == LAYERS
        for layer, wanted in enumerate(seen[name]):
            near(rec[name][layer], wanted)
    assert (
        rec["block_output"][LAYER][..., CHANNEL].abs().max() < 100
    )  # the massive activation is gone
    assert (rec["block_output"][LAYERS - 1] - plain).abs().max() > 1


@pytest.mark.parametrize("family", SDPA)
def test_every_step_of_cached_decoding(family):
    model = planted(family)
    ids = tokens(rows=2, length=9, delimiter_at=4)
    steps = []
    cache = None
    for chunk in (ids[:, :5], ids[:, 5:8], ids[:, 8:]):  # several new tokens behind a cache, too
        with Dense() as seen, torch.no_grad():
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        steps.append(seen.calls)
    cache = None
    with bs.record(model, ABOUT_ATTENTION) as rec, torch.no_grad():
        for chunk in (ids[:, :5], ids[:, 5:8], ids[:, 8:]):
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
    assert [step["probs"][0].shape[-2:] for step in rec.steps] == [(5, 5), (3, 8), (1, 9)]
    assert [step["k"][LAYERS - 1].shape[2] for step in rec.steps] == [
        5,
        8,
        9,
    ]  # not a view of a growing cache
    for step, calls in zip(rec.steps, steps):
        check(step, calls, 0)


def test_a_static_cache_does_not_write_to_earlier_steps():
    import transformers

    model = planted("llama")
    ids = tokens(rows=2, length=9, delimiter_at=4)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with bs.record(model, ("k", "v", "sink_mass")) as rec, torch.no_grad():
        model(ids[:, :4], past_key_values=cache, use_cache=True)
        model(ids[:, 4:6], past_key_values=cache, use_cache=True)
        second = {name: rec[name][LAYER].clone() for name in ("k", "v")}
        model(ids[:, 6:], past_key_values=cache, use_cache=True)
    assert all(torch.equal(rec.steps[1][name][LAYER], kept) for name, kept in second.items())
    masses = torch.cat([step["sink_mass"][LAYER] for step in rec.steps], -1)
    near(masses, dense(model, ids, use_cache=False)[LAYER].probs[..., 0], 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA)
def test_padding(family, side):
    """The start is the first real token of each row; a step of decoding later, too."""
    model = planted(family)
    lengths = (6, 9)
    length = 9
    ids = tokens(rows=2, length=length, delimiter_at=4)
    real = torch.stack(
        [
            torch.arange(length) >= length - n if side == "left" else torch.arange(length) < n
            for n in lengths
        ]
    )
    ids = ids.masked_fill(~real, PAD_ID)
    start = torch.tensor([3 if side == "left" else 0, 0])[:, None].expand(2, length)
    batch = {"attention_mask": real.long(), "use_cache": False}
    check(recorded(model, ABOUT_ATTENTION, ids, **batch), dense(model, ids, **batch), start, real)
    if side == "left":
        with torch.no_grad():
            cache = model(ids, attention_mask=real.long(), use_cache=True).past_key_values
        more = {"attention_mask": torch.cat([real, real[:, -1:]], 1).long(), "use_cache": True}
        calls = dense(
            model, tokens(2, 1, delimiter_at=None), past_key_values=copy.deepcopy(cache), **more
        )
        rec = recorded(
            model, ABOUT_ATTENTION, tokens(2, 1, delimiter_at=None), past_key_values=cache, **more
        )
        check(rec, calls, start[:, :1])
        assert not torch.allclose(
            rec["sink_mass"][0][0].double(), split(calls[0], 0)[1][0]
        )  # key 0 of the first row is padding


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt_neox"])
def test_packed_documents_have_a_start_each(family):
    model = planted(family)
    ids = tokens(rows=1, length=12)
    batch = {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "use_cache": False,
    }
    start = torch.tensor([[0] * 5 + [5] * 7])
    calls = dense(model, ids, **batch)
    assert calls[0].probs[..., 5:, :5].abs().max() == 0  # transformers keeps the documents apart
    check(recorded(model, ABOUT_ATTENTION, ids, **batch), calls, start)


def test_a_sliding_window_leaves_the_start_behind():
    import transformers

    torch.manual_seed(0)
    config = planted("mistral").config.to_dict() | {"sliding_window": 4}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    ids = tokens(rows=2, length=10)
    rec = recorded(model, ABOUT_ATTENTION, ids, use_cache=False)
    check(rec, dense(model, ids, use_cache=False), 0)
    assert (rec["sink_mass"][LAYER][..., 4:] == 0).all()
    assert (rec["sink_mass"][LAYER][..., :4] > 0).all()
    for name in {
        "past_key_values",
        cache_name(model),
    }:  # transformers renames the first to the second
        cache = None
        with bs.record(model, ("sink_mass", "value_updates", "k")) as rec, torch.no_grad():
            for token in ids.split(1, 1):
                cache = model(token, **{name: cache}, use_cache=True)[name]
        stepped = torch.cat([step["sink_mass"][LAYER] for step in rec.steps], -1)
        near(stepped, split(dense(model, ids, use_cache=False)[LAYER], 0)[1], 1e-4)
        assert rec["k"][LAYER].shape[2] < 10  # it has left the cache
        assert all((step["value_updates"][LAYER][0] == 0).all() for step in rec.steps[4:])


def test_looped_blocks_are_refused():
    model = planted("llama")
    model.model.layers = torch.nn.ModuleList([*model.model.layers[:-1], model.model.layers[0]])
    with (
        bs.record(model, "block_output"),
        pytest.raises(UnsupportedModel, match="block 0 has more than one block_output"),
    ):
        model(tokens(), use_cache=False)


@pytest.mark.parametrize("fused", [True, False])
def test_images(fused):
    model = planted_vit(reg_tokens=2)
    pixels = images(2)
    truth = dense(model, pixels)
    for block in model.blocks:
        block.attn.fused_attn = fused
    check(recorded(model, ABOUT_ATTENTION, pixels), truth, 0)
    with bs.record(model, "sink_mass") as rec, torch.no_grad():
        model.forward_features(pixels)
        model(pixels)
    assert len(rec.steps) == 2
    assert all(
        torch.equal(rec.steps[0]["sink_mass"][layer], rec["sink_mass"][layer])
        for layer in range(LAYERS)
    )


def test_given_sink_tokens_and_layers():
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    rec = recorded(
        model,
        ("sink_mass", "value_updates"),
        ids,
        use_cache=False,
        options={"sink_tokens": (0, 9), "layers": [3, 1]},
    )
    assert list(rec["sink_mass"]) == [1, 3]
    calls = dense(model, ids, use_cache=False)
    for layer in (1, 3):
        mass = calls[layer].probs[..., [0, 9]]
        near(rec["sink_mass"][layer], mass.sum(-1))
        near(rec["value_updates"][layer][0], mass @ calls[layer].v[:, :, [0, 9]], 2e-4)
        near(rec["value_updates"][layer].sum(0), calls[layer].out, 2e-4)


def test_a_patch_that_comes_while_it_records_is_recorded():
    """The hidden states are those that the next block reads, whichever came first."""
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    sites = bs.calibrate(model, ids)
    read = {}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: read.__setitem__(
                layer, (args[0] if args else kwargs["hidden_states"]).clone()
            ),
            with_kwargs=True,
        )
    with (
        bs.record(model, ("block_input", "block_output")) as rec,
        bs.patched(model, "set_zero", sites=sites),
        torch.no_grad(),
    ):
        model(ids)
    starts, ends = rec["block_input"], rec["block_output"]
    for layer in range(1, LAYERS):
        assert torch.equal(starts[layer], read[layer])
        assert torch.equal(ends[layer - 1], read[layer])
    assert (ends[LAYER][:, 0, CHANNEL] == 0).all()
