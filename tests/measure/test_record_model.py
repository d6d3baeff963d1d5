"""`record` beside biases, compilation, other records and training; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, LayerOutOfRange, UnsupportedModel
from biassurgery.measure.quantities import QUANTITIES
from tests.measure.recorded import ABOUT_ATTENTION, ATTENTION, check, near, recorded
from tests.models import (
    FAMILIES,
    HEADS,
    LAYER,
    LAYERS,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.state import untouched
from tests.written_out_attention import dense

NAMES = tuple(QUANTITIES)


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
        with pytest.raises((TypeError, AttributeError, RuntimeError, ValueError, BadBatch)):
            model("no tensor")
        model(batch)
        assert rec["sink_mass"][0].shape[1] == HEADS


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        ("attention", {}, BadOption, "what.*attention"),
        ((), {}, BadOption, "what.*nothing"),
        ("probs", {"layers": LAYERS}, LayerOutOfRange, "layers"),
        ("probs", {"layers": []}, BadOption, "layers"),
        ("sink_mass", {"sink_tokens": -1}, BadOption, "sink_tokens"),
        ("sink_mass", {"sink_tokens": "first"}, BadOption, "sink_tokens"),
        ("sink_mass", {"sink_tokens": ()}, BadOption, "sink_tokens"),
        ("probs", {"device": "nowhere"}, BadOption, "device"),
    ],
)
def test_refusals_come_before_any_change(what, options, error, message):
    model = planted("llama")
    with untouched(model), pytest.raises(error, match=message), bs.record(model, what, **options):
        raise AssertionError("it began")


def test_what_was_not_recorded_is_told():
    model = planted("llama")
    with bs.record(model, "probs") as rec:
        with pytest.raises(BadBatch, match="has not run"):
            rec["probs"]
        with pytest.raises(BadBatch, match="by itself"), torch.no_grad():
            model.model.layers[0](
                torch.zeros(1, 3, 64),
                position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)),
            )
        with torch.no_grad():
            model(tokens(1, 4, delimiter_at=None))
    with pytest.raises(BadOption, match="'q' was not recorded"):
        rec["q"]


def test_models_without_a_route_are_refused():
    import transformers

    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match="attention"),
        bs.record(model, "probs"),
    ):
        raise AssertionError("it began")
    assert recorded(model, "block_output", tokens(1, 4, delimiter_at=None))["block_output"][
        1
    ].shape == (1, 4, 32)
