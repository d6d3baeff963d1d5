"""Static int8 by torchao: which scales it gets, who chose them, and that nothing is half done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor

import biassurgery as bs
from biassurgery.errors import (
    BadBatch,
    BadOption,
    MissingPackage,
    NonFiniteActivation,
    UnsupportedModel,
)
from biassurgery.integrations import torchao, torchao_linears
from biassurgery.integrations.torchao import quantize_static
from tests.models import LAYERS, images, planted, planted_vit, tokens

BATCHES = [tokens(rows=2, length=40, seed=seed) for seed in range(1, 6)]
CALIBRATION, HELD = [*BATCHES[:3], BATCHES[4]], [BATCHES[3]]
DOWN = "model.layers.1.mlp.down_proj"


def magnitudes(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """All magnitudes that every linear layer of the blocks reads, by hooks."""
    caught: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: caught.setdefault(name, []).append(args[0].abs().flatten())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def weight_of(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name).weight


def test_scales_are_those_of_the_calibration_data():
    model = planted("llama")
    seen = magnitudes(model, BATCHES)
    found = quantize_static(model, BATCHES, quantiles=(1.0,))
    assert set(found.scales) == set(seen)
    assert (found.quantile, found.perplexities) == (1.0, {})
    for name, values in seen.items():
        weight = weight_of(model, name)
        assert isinstance(weight, Int8Tensor)
        assert found.scales[name] == pytest.approx(values.max().item(), rel=1e-6)
        assert weight.act_quant_scale.item() == pytest.approx(values.max().item() / 127, rel=1e-6)
        assert weight.act_quant_kwargs is not None
    assert not isinstance(model.lm_head.weight, Int8Tensor)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_quantile_is_that_of_all_magnitudes(share):
    model = planted("llama")
    seen = magnitudes(model, BATCHES)
    found = quantize_static(model, BATCHES, quantiles=(share,))
    for name, values in seen.items():
        exact = values.double().quantile(share).item()
        assert exact * 0.98 <= found.scales[name] <= exact * 1.05


def test_a_part_that_set_no_scale_chooses_the_quantile():
    model = planted("llama")
    seen = magnitudes(model, CALIBRATION)
    found = quantize_static(model, BATCHES, quantiles=(1.0, 0.99, 0.9))
    assert list(found.perplexities) == [1.0, 0.99, 0.9]
    assert found.quantile == min(found.perplexities, key=found.perplexities.__getitem__)
    of_chosen = found.perplexities[found.quantile]
    assert bs.perplexity(model, HELD, progress=False) == pytest.approx(of_chosen, rel=1e-6)
    other = copy.deepcopy(planted("llama"))
    assert quantize_static(other, CALIBRATION, quantiles=(found.quantile,)).scales == found.scales
    assert all(found.scales[name] <= values.max().item() * 1.0001 for name, values in seen.items())


def test_a_layer_computes_what_int8_computes():
    model = planted("llama")
    linear = copy.deepcopy(model.get_submodule(DOWN))
    found = quantize_static(model, BATCHES, quantiles=(1.0,))
    x = torch.randn(2, 5, linear.in_features)
    scale = found.scales[DOWN] / 127
    rounded = (x / scale).round().clamp(-128, 127) * scale
    rows = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127.5
    weight = weight_of(model, DOWN).dequantize()
    assert ((weight - linear.weight).abs() <= 0.51 * rows).all()
    with torch.no_grad():
        got, plain = model.get_submodule(DOWN)(x), linear(x)
    torch.testing.assert_close(got, rounded @ weight.T, rtol=1e-3, atol=1e-3)
    assert (got - plain).abs().max() > 0.1  # the range is the massive tokens', and coarse for these


def test_what_is_left_and_what_is_per_token():
    model = planted("llama")
    before = dict(model.named_parameters())
    found = quantize_static(
        model, BATCHES, ignore=[DOWN], per_token=["down_proj"], quantiles=(1.0,)
    )
    downs = {name for name, _ in model.named_modules() if name.endswith("down_proj")}
    assert found.ignored == (DOWN,)
    assert set(found.per_token) == downs - {DOWN}
    assert weight_of(model, DOWN) is before[f"{DOWN}.weight"]
    for name in found.per_token:
        assert weight_of(model, name).act_quant_scale is None
        assert weight_of(model, name).act_quant_kwargs is not None
    assert len(found.scales) == 7 * LAYERS - len(downs)


def test_an_ignore_list_is_what_helps():
    """What the whole of this is for, on the planted model: the massive layer out, less error."""
    model, ids = planted("llama"), tokens(rows=2, length=40, seed=9)
    names = bs.diagnose(model, BATCHES).ignore(3.0)
    assert names == [DOWN]
    with torch.no_grad():
        plain = model(ids).logits
        errors = []
        for ignore in ([], names):
            other = copy.deepcopy(model)
            quantize_static(other, BATCHES, ignore=ignore, quantiles=(1.0,))
            errors.append((other(ids).logits - plain).square().mean().item())
    assert errors[1] < errors[0] / 2


def test_smoothquant_with_static_scales():
    model = planted("llama")
    inputs = magnitudes(model, BATCHES)[DOWN].view(-1, 128)
    columns = model.get_submodule(DOWN).weight.abs().amax(0)
    found = quantize_static(model, BATCHES, smooth=0.5, quantiles=(1.0,), per_token=["o_proj"])
    weight = weight_of(model, DOWN)
    strength = (inputs.amax(0) + 1e-7).sqrt() / (columns + 1e-7).sqrt()
    torch.testing.assert_close(weight.act_pre_scale, 1 / strength, rtol=1e-3, atol=1e-3)
    largest = (inputs / strength).max().item()
    assert found.scales[DOWN] == pytest.approx(largest, rel=1e-3)
    assert weight.act_quant_scale.item() == pytest.approx(largest / 127, rel=1e-3)
    assert weight_of(model, found.per_token[0]).act_quant_scale is None
    assert weight_of(model, found.per_token[0]).act_pre_scale is not None
    x = inputs[:5]
    scale = largest / 127
    rounded = (x / strength / scale).round().clamp(-128, 127) * scale
    with torch.no_grad():
        got = model.get_submodule(DOWN)(x[None])[0]
    torch.testing.assert_close(got, rounded @ weight.dequantize().T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_whatever_happens_the_model_is_as_it_was(smooth, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> float:
        raise NonFiniteActivation("data: none")

    model = planted("llama")
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    weights = dict(model.named_parameters())
    monkeypatch.setattr(torchao, "perplexity", fail)
    with pytest.raises(NonFiniteActivation):
        quantize_static(model, BATCHES, smooth=smooth)
    assert dict(model.named_modules()) == modules
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_padding_sets_no_scale():
    model, ids = planted("llama"), tokens(rows=2, length=40)
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    ids[:, 35] = 1  # a delimiter where nobody reads it
    masked = copy.deepcopy(model)
    found = quantize_static(
        masked, {"input_ids": ids, "attention_mask": mask}, quantiles=(1.0,)
    ).scales
    plain = quantize_static(model, ids[:, :30], quantiles=(1.0,)).scales
    for name, value in plain.items():
        assert found[name] == pytest.approx(value, rel=1e-4)


def test_images_have_no_perplexity_to_choose_by():
    model = planted_vit()
    with pytest.raises(UnsupportedModel, match=r"quantiles=\(0\.9999,\)"):
        quantize_static(model, images(2))
    found = quantize_static(model, images(2), quantiles=(1.0,))
    assert isinstance(weight_of(model, "blocks.1.mlp.fc2"), Int8Tensor)
    assert len(found.scales) == 4 * LAYERS


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ignore": ["down"]}, BadOption, "'down' is no linear layer"),
        ({"ignore": DOWN}, BadOption, "list of names"),
        ({"per_token": ["lm_head"]}, BadOption, "'lm_head' is no linear layer"),
        ({"smooth": 1.5}, BadOption, "smooth: 1.5"),
        ({"smooth": True}, BadOption, "smooth: True"),
        ({"quantiles": ()}, BadOption, "quantiles"),
        ({"quantiles": (0.1,)}, BadOption, "quantiles"),
        ({"quantiles": 0.99}, BadOption, "quantiles"),
    ],
)
def test_options_that_are_none(options, error, words):
    model = planted("llama")
    weights = dict(model.named_parameters())
    with pytest.raises(error, match=words):
        quantize_static(model, BATCHES, **options)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())


def test_models_that_cannot_be_quantised():
    with pytest.raises(UnsupportedModel, match="Conv1D"):
        quantize_static(planted("gpt2"), BATCHES)
    model = planted("llama")
    with pytest.raises(BadBatch, match="one sequence"):
        quantize_static(model, BATCHES[0][:1])
    quantize_static(model, BATCHES[0], quantiles=(1.0,))
    with pytest.raises(UnsupportedModel, match="before it was quantised"):
        quantize_static(model, BATCHES[0], quantiles=(1.0,))


def test_an_older_torchao_is_refused(monkeypatch):
    monkeypatch.setattr(torchao_linears, "version", lambda name: "0.17.0+cpu")
    model = planted("llama")
    with pytest.raises(MissingPackage, match=r"0\.18"):
        quantize_static(model, BATCHES)
    assert type(model.get_submodule(DOWN).weight) is nn.Parameter
