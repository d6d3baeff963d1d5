"""`record` against the softmax of every attention written out in float64, and against plain
hooks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import biassurgery as bs
from biassurgery.measure.record import NAMES
from tests.contract.cases import cache_name
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
from tests.state import untouched
from tests.written_out_attention import Dense, dense

SDPA = tuple(family for family in FAMILIES if family != "mpt")  # MPT has no such attention
ATTENTION = {
    "gpt2": "attn",
    "mpt": "attn",
    "falcon": "self_attention",
    "falcon_alibi": "self_attention",
    "gpt_neox": "attention",
}


@torch.no_grad()
def recorded(model, what, *args, options=None, **kwargs):
    with bs.record(model, what, **(options or {})) as rec:
        model(*args, **kwargs)
    return rec


def near(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def split(call, columns):
    """(2, B, H, T, dv): what the keys `columns`, (B, T) or an index, give to the output, and the
    rest. Also their share (B, H, T).
    """
    if isinstance(columns, int):
        columns = torch.full(call.probs.shape[:1] + call.probs.shape[2:3], columns)
    chosen = torch.nn.functional.one_hot(columns, call.probs.shape[-1]).bool()[:, None]
    sinks, others = (call.probs.masked_fill(~part, 0) @ call.v for part in (chosen, ~chosen))
    return torch.stack([sinks, others]), call.probs.masked_fill(~chosen, 0).sum(-1)


def check(rec, calls, start, real=None):
    """Everything about attention in one step; `real` (B, T): queries to compare, for those at
    padding mean nothing.
    """
    pick = slice(None) if real is None else real[:, None].expand(-1, HEADS, -1)
    for layer, call in enumerate(calls):
        updates, mass = split(call, start)
        groups = HEADS // rec["k"][layer].shape[1]
        near(rec["q"][layer], call.q)
        near(rec["k"][layer].repeat_interleave(groups, 1), call.k)
        near(rec["v"][layer].repeat_interleave(groups, 1), call.v)
        near(rec["logits"][layer][pick], call.logits[pick], 1e-4)
        near(rec["probs"][layer][pick], call.probs[pick])
        near(rec["sink_mass"][layer][pick], mass[pick])
        for found, wanted in zip(rec["value_updates"][layer], updates):
            near(found[pick], wanted[pick], 2e-4)
        assert rec["bias_mass"][layer].abs().max() == 0


ABOUT_ATTENTION = ("q", "k", "v", "logits", "probs", "sink_mass", "value_updates", "bias_mass")


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
        pytest.raises(bs.UnsupportedModel, match="block 0 has more than one block_output"),
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


@pytest.mark.parametrize("family", ["llama", "falcon_alibi", "mpt", "timm"])
def test_explicit_biases_take_the_rest_of_the_attention(family):
    model, batch = (
        (planted_vit(), images(2))
        if family == "timm"
        else (planted(family), tokens(rows=2, length=12))
    )
    plain = recorded(model, ("probs", "logits"), batch)
    bs.patch_model(model, "attention_bias", kind="kv", init="normal", std=1.0)
    rec = recorded(model, ABOUT_ATTENTION, batch)
    bias = dict(model.named_parameters())
    name = ATTENTION.get(family, "attn" if family == "timm" else "self_attn")
    for layer in range(LAYERS):
        key, value = (
            next(p for n, p in bias.items() if f".{layer}.{name}." in n and n.endswith(end))
            .double()
            .detach()
            for end in ("k_bias", "v_bias")
        )
        q = rec["q"][layer].double()
        v = rec["v"][layer].double()
        groups = HEADS // rec["v"][layer].shape[1]
        key = key.repeat_interleave(groups, 0)
        value = value.repeat_interleave(groups, 0)
        v = v.repeat_interleave(groups, 1)
        column = (q * key[:, None]).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        probs = torch.cat([rec["logits"][layer].double(), column], -1).softmax(-1)
        near(rec["probs"][layer], probs[..., :-1])
        near(rec["bias_mass"][layer], probs[..., -1])
        near(rec["sink_mass"][layer], probs[..., 0])
        near(rec["probs"][layer].sum(-1) + rec["bias_mass"][layer], torch.ones_like(probs[..., 0]))
        near(
            rec["value_updates"][layer].sum(0),
            probs[..., :-1] @ v + probs[..., -1:] * value[:, None],
            2e-4,
        )
    assert rec["bias_mass"][0].max() > 0.1
    near(
        rec["logits"][0], plain["logits"][0]
    )  # those of the keys in the first layer are as they were
    assert (rec["probs"][0] - plain["probs"][0]).abs().max() > 0.01


def test_a_compiled_model_is_recorded_and_stays_compiled():
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    truth = dense(model, ids, use_cache=False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        check(recorded(compiled, ABOUT_ATTENTION, ids, use_cache=False), truth, 0)
        assert torch.equal(compiled(ids, use_cache=False).logits, before)


def test_records_within_records_and_on_the_body():
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    truth = dense(model, ids, use_cache=False)
    with bs.record(model, ("probs", "block_output")) as outer, torch.no_grad():
        model(ids, use_cache=False)
        with bs.record(model, ("sink_mass", "probs"), layers=2) as inner:
            model.model(ids, use_cache=False)
        model(ids, use_cache=False)
    assert (len(outer.steps), len(inner.steps)) == (3, 1)
    near(inner["sink_mass"][2], truth[2].probs[..., 0])
    for step in outer.steps:
        near(step["probs"][2], truth[2].probs)


class NoSquare(TorchDispatchMode):
    """Fails where any operation returns `limit` elements or more."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.numel() >= self.limit:
                raise MemoryError(f"{func} makes {tuple(each.shape)}")
        return result


def test_shares_and_updates_need_no_square_matrix():
    model = planted("llama")
    ids = tokens(rows=1, length=1024)
    model.config.max_position_embeddings = 1024
    with NoSquare(HEADS * 1024 * 1024):  # a mask of the host has no heads
        rec = recorded(
            model,
            ("sink_mass", "value_updates", "bias_mass", "q", "k", "v", "attention_output"),
            ids,
            use_cache=False,
        )
        with pytest.raises(MemoryError):
            recorded(model, "probs", ids, use_cache=False)
    near(
        rec["sink_mass"][LAYER],
        recorded(model, "probs", ids, use_cache=False)["probs"][LAYER][..., 0],
    )


def test_device_keeps_copies_there_without_gradient():
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    with bs.record(model, NAMES, device="cpu") as rec:
        model(ids, use_cache=False)
    assert set(rec) == set(NAMES)
    for name in NAMES:
        assert sorted(rec[name]) == list(range(LAYERS))
        assert all(t.device.type == "cpu" and not t.requires_grad for t in rec[name].values())


@pytest.mark.parametrize("kind", [None, "kv"])
def test_gradients_of_what_is_not_detached(kind):
    """d(sum of weights * recorded) / d embedding equals that through the eager model's own weights,
    padding and biases included.
    """
    ids = tokens(rows=2, length=8, delimiter_at=4)
    real = torch.arange(8) >= torch.tensor([[3], [0]])
    model = planted("llama").double()
    if kind:
        bs.patch_model(model, "attention_bias", kind=kind, init="normal", std=1.0)
    weights = (
        torch.randn(2, HEADS, 8, generator=torch.Generator().manual_seed(3)).double()
        * real[:, None]
    )

    def gradient(name, layer=3):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with bs.record(model, (name, "q", "k", "v"), detach=False) as rec:
            model(inputs_embeds=embedded, attention_mask=real.long(), use_cache=False)
        q, k, v = (rec[each][layer] for each in "qkv")
        logits = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
        seen = torch.ones(8, 8, dtype=torch.bool).tril() & (
            real[:, None, None] | torch.eye(8, dtype=torch.bool)
        )
        logits = logits.masked_fill(~seen, -torch.inf)
        if kind:
            bias = dict(model.model.layers[layer].self_attn.named_parameters())
            key = next(p for n, p in bias.items() if n.endswith("k_bias")).repeat_interleave(2, 0)[
                :, None
            ]
            logits = torch.cat([logits, (q * key).sum(-1, keepdim=True) * q.shape[-1] ** -0.5], -1)
        probs = logits.softmax(-1)[..., :8]
        start = real.int().argmax(1)[:, None, None, None].expand(2, HEADS, 8, 1)
        truth = {
            "sink_mass": probs.gather(-1, start)[..., 0],
            "probs": probs,
            "value_updates": (
                probs.gather(-1, start)
                * v.repeat_interleave(2, 1).gather(2, start[:, :, :1].expand(2, HEADS, 1, 16))
            ),
        }
        found = rec[name][layer]
        found, wanted = {
            "sink_mass": (found, truth[name]),
            "probs": (found.square().sum(-1), truth[name].square().sum(-1)),
            "value_updates": (found[0].square().sum(-1), truth[name].square().sum(-1)),
        }[name]
        pick = real[:, None].expand_as(found)
        near(found[pick], wanted[pick], 1e-9)
        return [
            torch.autograd.grad((each * weights)[pick].sum(), embedded, retain_graph=True)[0]
            for each in (found, wanted)
        ]

    for name in ("sink_mass", "probs", "value_updates"):
        found, wanted = gradient(name)
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


def test_gradients_reach_a_recorded_hidden_state():
    model = planted("llama")
    ids = tokens(rows=1, length=8, delimiter_at=4)
    with bs.record(model, "block_output", detach=False) as rec:
        loss = model(ids, labels=ids, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, rec["block_output"][2])
    assert gradient.abs().max() > 0


def test_gradient_checkpointing_records_each_forward_once():
    model = planted("llama")
    ids = tokens(rows=1, length=8, delimiter_at=4)
    truth = recorded(model, ("probs", "block_output"), ids, use_cache=False)
    model.gradient_checkpointing_enable()
    model.train()
    with bs.record(model, ("probs", "block_output")) as rec:
        first, second = (
            model(batch, labels=batch, use_cache=False).loss for batch in (ids, ids.flip(1))
        )
        kept = {name: rec.steps[1][name][2].clone() for name in rec}
        (first + second).backward()
    assert len(rec.steps) == 2
    for name in rec:
        near(rec.steps[0][name][2], truth[name][2])
        assert torch.equal(
            rec.steps[1][name][2], kept[name]
        )  # running the first forward again does not write here


@pytest.mark.parametrize("family", [*FAMILIES, "timm"])
def test_the_model_is_left_as_it_was(family):
    model, batch = (
        (planted_vit(), images(2))
        if family == "timm"
        else (planted(family), tokens(rows=2, length=12))
    )

    def run_and_fail():
        with bs.record(model, NAMES), torch.no_grad():
            model(batch)
            raise KeyError("on purpose")

    with untouched(model, batch), pytest.raises(KeyError, match="on purpose"):
        run_and_fail()
    with untouched(model, batch), bs.record(model, "sink_mass") as rec, torch.no_grad():
        with pytest.raises((TypeError, AttributeError, RuntimeError, ValueError, bs.BadBatch)):
            model("no tensor")
        model(batch)
        assert rec["sink_mass"][0].shape[1] == HEADS


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        ("attention", {}, bs.BadOption, "what.*attention"),
        ((), {}, bs.BadOption, "what.*nothing"),
        ("probs", {"layers": LAYERS}, bs.LayerOutOfRange, "layers"),
        ("probs", {"layers": []}, bs.BadOption, "layers"),
        ("sink_mass", {"sink_tokens": -1}, bs.BadOption, "sink_tokens"),
        ("sink_mass", {"sink_tokens": "first"}, bs.BadOption, "sink_tokens"),
        ("sink_mass", {"sink_tokens": ()}, bs.BadOption, "sink_tokens"),
        ("probs", {"device": "nowhere"}, bs.BadOption, "device"),
    ],
)
def test_refusals_come_before_any_change(what, options, error, message):
    model = planted("llama")
    with untouched(model), pytest.raises(error, match=message), bs.record(model, what, **options):
        raise AssertionError("it began")


def test_what_was_not_recorded_is_told():
    model = planted("llama")
    with bs.record(model, "probs") as rec:
        with pytest.raises(bs.BadBatch, match="has not run"):
            rec["probs"]
        with pytest.raises(bs.BadBatch, match="by itself"), torch.no_grad():
            model.model.layers[0](
                torch.zeros(1, 3, 64),
                position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)),
            )
        with torch.no_grad():
            model(tokens(1, 4, delimiter_at=None))
    with pytest.raises(bs.BadOption, match="'q' was not recorded"):
        rec["q"]


def test_models_without_a_route_are_refused():
    import transformers

    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    with (
        untouched(model),
        pytest.raises(bs.UnsupportedModel, match="attention"),
        bs.record(model, "probs"),
    ):
        raise AssertionError("it began")
    assert recorded(model, "block_output", tokens(1, 4, delimiter_at=None))["block_output"][
        1
    ].shape == (1, 4, 32)
