"""The modes on attention beside each other, beside other modes, and on hosts of particular
kinds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadOption, UnsupportedModel
from tests.models import HEADS, LAYERS, attentions, planted, planted_vit, tokens
from tests.state import output_of, untouched

IDS = tokens(2, 12, delimiter_at=5)


# Every sort of patch that can be on a model at once.
PATCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero": ("set_zero", {}),
    "kv": ("attention_bias", {"kind": "kv", "std": 1.0}),
    "sink": ("attention_bias", {"kind": "sink_logit", "std": 1.0}),
    "gate": ("attention_bias", {"kind": "gate", "std": 1.0}),
    "watch": ("instrument", {}),
}


def put(model: Any, name: str) -> Any:
    mode, options = PATCHES[name]
    torch.manual_seed(len(name) + ord(name[0]))
    return bs.patch_model(
        model,
        mode,
        **options,
        **({"sites": bs.calibrate(planted("llama"), [IDS])} if mode == "set_zero" else {}),
    )


def put_all(names: Any) -> Any:
    model = planted("llama")
    for name in names:
        put(model, name)
    return model


@pytest.mark.parametrize(
    "order", [[*PATCHES], ["gate", "watch", "sink", "zero", "kv"]], ids=",".join
)
def test_stacked_patches_come_off_in_any_order(order: list[str]) -> None:
    """Those left compute what they do on a model of their own."""
    for gone in (order, order[::-1]):
        model = put_all(order)
        left = [*order]
        applied = dict(zip(order, bs.patches(model)))
        with_all = output_of(model, IDS)
        for name in gone:
            bs.unpatch_model(model, applied[name].mode)
            left.remove(name)
            assert torch.equal(output_of(model, IDS), output_of(put_all(left), IDS))
            assert name == "watch" or not torch.equal(output_of(model, IDS), with_all)
        assert torch.equal(output_of(model, IDS), output_of(planted("llama"), IDS))


def test_two_columns_share_one_softmax() -> None:
    """Against float64: the key with its value and the sink's logit beside the keys, the gate on
    what they give.
    """
    model = planted("llama", torch.float64)
    module, projection = attentions(model, "llama")[0]
    for name in ("kv", "sink", "gate"):
        put(model, name)
    seen: dict[str, Any] = {}
    projection.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    module.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(read=kwargs["hidden_states"]), with_kwargs=True
    )
    with bs.record(model, ("q", "k", "v"), layers=0) as rec:
        output_of(model, IDS)
    q, k, v = rec["q"][0], *(rec[name][0].repeat_interleave(2, 1) for name in "kv")
    bias = {
        name.rpartition(".")[2]: p.detach()
        for name, p in module.named_parameters()
        if "attention_bias" in name
    }
    key, value = (bias[name].repeat_interleave(2, 0)[:, None] for name in ("k_bias", "v_bias"))
    logits = (q @ k.mT * 0.25).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    extra = [
        (q * key).sum(-1, keepdim=True) * 0.25,
        bias["sink_logit"][:, None, None].expand(2, HEADS, 12, 1),
    ]
    probs = torch.cat([logits, *extra], -1).softmax(-1)
    out = probs[..., :12] @ v + probs[..., 12:13] * value
    out = out * 2 * torch.sigmoid(seen["read"] @ bias["gate"].mT).mT[..., None]
    torch.testing.assert_close(
        seen["heads"], out.transpose(1, 2).flatten(2), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["kv", "k", "v"])
def test_key_values_as_initial_values(kind: str) -> None:
    """What the start token gives is what the parameters begin with, on the layers that are asked
    for.
    """
    key_values = bs.calibrate_key_values(planted("mistral"), IDS)
    model = bs.patch_model(
        planted("mistral"), "attention_bias", kind=kind, init=key_values, layers=[2, 4]
    )
    for layer, (module, _) in enumerate(attentions(model, "mistral")):
        found = {
            name.rpartition(".")[2]: p
            for name, p in module.named_parameters()
            if "attention_bias" in name
        }
        wanted = {"k_bias": key_values.keys[layer], "v_bias": key_values.values[layer]}
        assert set(found) == ({f"{letter}_bias" for letter in kind} if layer in (2, 4) else set())
        assert all(torch.equal(p, wanted[name]) for name, p in found.items())


def sliding(window: int) -> Any:
    import transformers

    config = planted("mistral").config.to_dict() | {"sliding_window": window}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    model.load_state_dict(planted("mistral").state_dict())
    return model


@pytest.mark.parametrize("window", [3, 4, 7, 12, 20])
def test_transplant_under_a_sliding_window(window: int) -> None:
    """Queries too far from the start do not see its key, in prefill and in cached decoding; exact
    for every window.
    """
    wanted = output_of(sliding(window), IDS)[:, 1:]
    model = bs.patch_model(
        sliding(window), "transplant", key_values=bs.calibrate_key_values(sliding(window), IDS)
    )
    assert (output_of(model, IDS[:, 1:]) - wanted).abs().max() < 1e-4
    for prefill in (1, 5):
        past = None
        parts = []
        for chunk in IDS[:, 1:].split([prefill] + [1] * (11 - prefill), 1):
            with torch.no_grad():
                output = model(chunk, past_key_values=past, use_cache=True)
            past = output.past_key_values
            parts.append(output.logits)
        assert (torch.cat(parts, 1) - wanted).abs().max() < 1e-4
    mask = torch.ones(2, 14, dtype=torch.long).index_fill(1, torch.arange(3), 0)
    with torch.no_grad():
        padded = model(
            torch.cat([IDS[:, :3], IDS[:, 1:]], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits
    assert (padded[:, 3:] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "kq"},
        {"kind": None},
        {"init": "zeros"},
        {"init": 0.0},
        {"kind": "off_by_one", "init": "zero_effect"},
        {"std": 0.0},
        {"std": -1},
        {"std": float("inf")},
        {"std": "big"},
        {"trainable": "some"},
        {"layers": "first"},
        {"layers": []},
        {"value": 3.0},
    ],
    ids=str,
)
def test_refused_options(options: dict[str, Any]) -> None:
    model = planted("llama")
    with untouched(model, IDS), pytest.raises(BadOption):
        bs.patch_model(model, "attention_bias", **options)


@pytest.mark.parametrize("kind", ["sink_logit", "gate", "off_by_one"])
def test_key_values_for_kinds_without_key_and_value(kind: str) -> None:
    model = planted("llama")
    key_values = bs.calibrate_key_values(planted("llama"), IDS)
    with untouched(model, IDS), pytest.raises(BadOption, match="init"):
        bs.patch_model(model, "attention_bias", kind=kind, init=key_values)


def test_images_have_no_start_token() -> None:
    model = planted_vit()
    with untouched(model), pytest.raises(UnsupportedModel, match="no start token"):
        bs.calibrate_key_values(model, torch.randn(2, 3, 28, 28))
    with untouched(model), pytest.raises(bs.SurgeryError):
        bs.patch_model(
            model, "transplant", key_values=bs.calibrate_key_values(planted("llama"), IDS)
        )


def test_zero_effect_is_silent_but_its_value_can_learn_once_the_offset_is_gone() -> None:
    """Under `zero_effect` the column takes exactly no share, so no gradient; with offset 0 it is
    equation 3.
    """
    model = bs.patch_model(planted("llama"), "attention_bias", kind="kv", init="zero_effect")
    names = [name for name, _ in model.named_parameters() if name.endswith(("k_bias", "v_bias"))]
    assert len(names) == 2 * LAYERS
    model(IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad.abs().max() == 0 for name in names)
    for name in names[::2]:
        model.get_buffer(name.replace("k_bias", "logit")).zero_()
    model(IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)


def test_each_layer_has_its_own_dtype() -> None:
    """A model of mixed precision: the parameters of a bias are in the dtype of their layer."""
    model = planted("gpt2")
    model.transformer.h[2].to(torch.bfloat16)
    bs.patch_model(model, "attention_bias", kind="kv")
    found = [module.attention_bias_kv.k_bias.dtype for module, _ in attentions(model, "gpt2")]
    assert found == [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]


def quantised(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def applied(name: str, model: Any) -> Any:
    torch.manual_seed(3)
    if name == "transplant":
        return bs.patch_model(
            model, name, key_values=bs.calibrate_key_values(quantised(planted("llama")), IDS)
        )
    return bs.patch_model(
        model, name, **({"kind": "kv", "std": 1.0} if name == "attention_bias" else {})
    )


@pytest.mark.parametrize("name", ["instrument", "attention_bias", "transplant"])
def test_quantised_linears(name: str) -> None:
    """int8 weights of torchao, before and after patching; the biases stay as precise as they
    are.
    """
    plain = output_of(quantised(planted("llama")), IDS)
    read = IDS[:, 1:] if name == "transplant" else IDS
    assert not torch.equal(plain, output_of(planted("llama"), IDS))
    after = applied(name, quantised(planted("llama")))
    before = quantised(applied(name, planted("llama")))
    assert type(after.model.layers[0].self_attn.q_proj.weight) is type(
        before.model.layers[0].self_attn.q_proj.weight
    )
    assert type(after.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    assert {
        p.dtype for n, p in before.named_parameters() if "_bias." in n or n.endswith("_bias")
    } <= {torch.float32}
    assert torch.equal(output_of(after, read), output_of(before, read))
    if name == "transplant":
        assert (output_of(after, read) - plain[:, 1:]).abs().max() < 1e-4
    elif name == "instrument":
        torch.testing.assert_close(output_of(after, read), plain, rtol=1e-4, atol=1e-4)
    else:
        assert (output_of(after, read) - plain).abs().max() > 0.1
    bs.unpatch_model(after)
    assert torch.equal(output_of(after, IDS), plain)


@pytest.mark.long
def test_inductor() -> None:
    """The default backend, in one graph, before and after the patch; two layers are enough."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    small = planted("llama")
    del small.model.layers[2:]
    small.config.num_hidden_layers = 2
    model = torch.compile(small, fullgraph=True)

    def run(target: Any) -> Tensor:
        with torch.no_grad():
            return target(IDS, use_cache=False).logits

    plain = run(small)
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-4)
    bs.patch_model(model, "attention_bias", kind="kv", std=1.0)
    patched = run(small)
    assert (patched - plain).abs().max() > 0.01
    torch.testing.assert_close(run(model), patched, rtol=1e-4, atol=1e-4)
    bs.unpatch_model(model)
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_what_cannot_train_is_refused():
    model = planted("llama")
    with untouched(model):
        for options in (
            {"kind": "off_by_one"},
            {"kind": "kv", "init": "zero_effect"},
            {"kind": "sink_logit", "init": "zero_effect"},
        ):
            with pytest.raises(BadOption, match="trainable"):
                bs.patch_model(model, "attention_bias", trainable="bias", **options)


@pytest.mark.parametrize("bias", [False, True])
def test_returned_attention_is_part_of_the_graph(bias):
    """An eager host returns the shares that its output is made of: gradients go through them."""
    model = planted("llama")
    model.set_attn_implementation("eager")
    plain = model(IDS, output_attentions=True)
    plain.attentions[1].retain_grad()
    plain.logits.sum().backward()
    wanted = plain.attentions[1].grad
    assert wanted.abs().max() > 0
    if bias:
        bs.patch_model(model, "attention_bias", kind="kv", init="zero_effect")
    else:
        bs.patch_model(model, "instrument")
    found = model(IDS, output_attentions=True)
    found.attentions[1].retain_grad()
    found.logits.sum().backward()
    torch.testing.assert_close(found.attentions[1].grad, wanted, rtol=1e-4, atol=1e-5)
