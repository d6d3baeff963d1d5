"""Fake int8 against rounding written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.evaluate.quantised import fake_quantised, measured
from tests.models import blocks, planted, tokens


def rounded(x, largest):
    """To 127 levels of `largest`, beyond which it clips."""
    scale = torch.as_tensor(largest).clamp(min=1e-12) / 127  # some planted rows are zero
    return (x / scale).round().clamp(-127, 127) * scale


def expected(linear, x, activations, largest):
    weight = linear.weight if hasattr(linear, "out_features") else linear.weight.T
    weight = rounded(weight, weight.abs().amax(1, keepdim=True))
    if activations == "static":
        x = rounded(x, largest)
    if activations == "tensor":
        x = rounded(x, x.abs().max())
    if activations == "token":
        x = rounded(x, x.abs().amax(-1, keepdim=True))
    return F.linear(x, weight, linear.bias)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("activations", ["exact", "static", "tensor", "token"])
def test_a_layer_computes_as_int8_would(family, activations):
    model = planted(family)
    linear = blocks(model, family)[2].mlp
    linear = linear.down_proj if family == "llama" else linear.c_proj
    width = linear.weight.shape[1 if family == "llama" else 0]
    x = torch.randn(2, 5, width)
    largest = {name: 2.0 for name, _ in model.named_modules()}
    want = expected(linear, x, activations, 2.0)
    plain = linear(x)
    with torch.no_grad(), fake_quantised(model, activations, largest=largest):
        got = linear(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-3
    assert torch.equal(linear(x), plain)


def test_what_is_ignored_stays_and_what_is_per_token_is():
    model, ids = planted("llama"), tokens(rows=2, length=20)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names.remove("lm_head")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids).logits
        with fake_quantised(model, "tensor", ignore=names):
            assert torch.equal(model(ids).logits, plain)
        with fake_quantised(model, "token"):
            by_token = model(ids).logits
        with fake_quantised(model, "tensor", per_token=names):
            assert torch.equal(model(ids).logits, by_token)
        with fake_quantised(model, "tensor"):
            assert not torch.equal(model(ids).logits, by_token)
        assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_refusals_come_before_anything_is_changed():
    model = planted("llama")
    with pytest.raises(BadOption, match="'lm_head' is no linear layer of the blocks"):
        fake_quantised(model, "token", ignore=["lm_head"]).__enter__()
    with pytest.raises(BadOption, match="nothing is known of"):
        fake_quantised(model, "static").__enter__()
    assert not any(hasattr(module, "weights") for module in model.modules())


def test_perplexity_under_each_remedy():
    model = planted("llama")
    batches = [tokens(rows=2, length=40, seed=seed) for seed in (1, 2)]
    found = bs.diagnose(model, batches, measure=True)
    cells = {(row.quantisation, row.remedy): row.perplexity for row in found.measured}
    remedies = {remedy for _, remedy in cells}
    assert {"as it is", "transplant"} <= remedies
    labels = [torch.where(torch.arange(40) < 2, -100, ids) for ids in batches]
    want = bs.perplexity(
        model, [{"input_ids": i, "labels": j} for i, j in zip(batches, labels)], progress=False
    )
    assert cells["float", "as it is"] == pytest.approx(want, rel=1e-6)
    assert cells["float", "transplant"] == pytest.approx(want, rel=1e-4)
    assert cells["static", "as it is"] != pytest.approx(want, rel=1e-4)
    assert len(cells) == 5 * len(remedies)
    assert bs.patches(model) == ()
    assert "Perplexity under fake int8" in str(found)


def test_what_cannot_be_measured_is_refused_at_once():
    model = planted("llama")
    with pytest.raises(BadOption, match="can be read once"):
        bs.diagnose(model, iter([tokens()]), measure=True)
    with pytest.raises(UnsupportedModel, match="head"):
        bs.diagnose(model.model, tokens(), measure=True)


def test_pin_has_cells_where_massive_tokens_rule_a_layer():
    model = planted("llama")
    batches = [tokens(rows=2, length=40, seed=seed, delimiter_at=None) for seed in (1, 2)]
    found = bs.diagnose(model, batches)
    rows = [
        replace(row, ordinary=min(row.ordinary, row.largest / 20)) for row in found.linears[:14]
    ]
    ruled = replace(found, linears=(*rows, *found.linears[14:]))
    cells, notes = measured(model, batches, ruled)
    values = {(row.quantisation, row.remedy): row.perplexity for row in cells}
    assert notes == ()
    assert {remedy for _, remedy in values} == {"as it is", "ignore", "pin", "transplant"}
    assert values["float", "pin"] == pytest.approx(values["float", "as it is"], rel=0.01)
    assert values["static", "ignore"] != values["static", "as it is"]
    assert bs.patches(model) == ()


def test_groups_have_scales_of_their_own():
    model = planted("llama")
    linear = blocks(model, "llama")[2].mlp.down_proj
    width = linear.weight.shape[1]
    x = torch.randn(2, 5, width)
    parts = linear.weight.unflatten(1, (2, width // 2))
    scale = parts.abs().amax(2, keepdim=True).clamp(min=1e-12) / 3  # of 3 bits
    want = F.linear(x, ((parts / scale).round() * scale).flatten(1))
    with torch.no_grad():
        with fake_quantised(model, "exact", bits=3, group=width // 2):
            got = linear(x)
        with fake_quantised(model, "exact", bits=3):
            assert (linear(x) - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadOption, match="group: 7 does not divide the"):
        fake_quantised(model, "exact", group=7).__enter__()


def test_factors_go_from_inputs_to_weights():
    """As in SmoothQuant: what is multiplied on one side is divided on the other, then rounded."""
    model = planted("llama")
    name = "model.layers.2.mlp.down_proj"
    linear = model.get_submodule(name)
    x = torch.randn(2, 5, linear.weight.shape[1])
    factors = torch.rand(linear.weight.shape[1]) + 0.2
    weight = linear.weight / factors
    weight = rounded(weight, weight.abs().amax(1, keepdim=True))
    want = F.linear(rounded(x * factors, 2.0), weight)
    largest = {name: 2.0 for name, _ in model.named_modules()}
    with torch.no_grad():
        with fake_quantised(model, "static", largest=largest, factors={name: factors}):
            got = linear(x)
        with fake_quantised(model, "static", largest=largest):
            assert (linear(x) - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
