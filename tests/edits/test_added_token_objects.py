"""Test-time registers through training, casts, compilation, copies and files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import Incompatible
from tests.edits.plain_hooks import TOLERANCE, neurons_of, pickle_and_back, random_vit, reference
from tests.models import (
    images,
)
from tests.state import output_of, untouched


def test_checkpointing_and_training():
    model = random_vit(torch.float32)
    batch = images(3)
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    model.train()
    model(batch).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(batch).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = random_vit(dtype)
    batch = images(3).to(dtype)
    neurons = neurons_of(model)
    expected = reference(model.double(), batch.double())
    plain = output_of(model, batch.double())
    bs.patch_model(model.to(dtype), "test_time_registers", neurons=neurons)
    found = output_of(model, batch)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < 0.2 * (expected - plain).abs().max()


def test_cast_after_patching():
    model = random_vit(torch.float32)
    batch = images(3).bfloat16()
    cast_first = random_vit(torch.float32).bfloat16()
    for each in (model, cast_first):
        bs.patch_model(each, "test_time_registers", neurons=neurons_of(model))
    assert torch.equal(output_of(model.bfloat16(), batch), output_of(cast_first, batch))


@pytest.mark.parametrize("patch_first", [True, False])
def test_compiled_in_one_graph(patch_first):
    torch._dynamo.reset()
    model = random_vit(torch.float32)
    batch = images(3)
    plain = output_of(model, batch)
    neurons = neurons_of(model)
    with bs.patched(model, "test_time_registers", neurons=neurons):
        expected = output_of(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not patch_first:
        torch.testing.assert_close(output_of(compiled, batch), plain)
    bs.patch_model(compiled, "test_time_registers", neurons=neurons)
    torch.testing.assert_close(output_of(compiled, batch), expected)
    bs.unpatch_model(compiled)
    torch.testing.assert_close(output_of(compiled, batch), plain)
    assert (expected - plain).abs().max() > 1e-3
    torch._dynamo.reset()


def test_copies_have_a_patch_of_their_own():
    model = random_vit()
    batch = images(3).double()
    plain = output_of(model, batch)
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    patched = output_of(model, batch)
    copies = [copy.deepcopy(model), pickle_and_back(model)]
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), plain)
    for twin in copies:
        assert torch.equal(output_of(twin, batch), patched)
        assert [patch.mode.name for patch in bs.patches(twin)] == ["test_time_registers"]
        assert torch.equal(output_of(bs.unpatch_model(twin), batch), plain)
        assert {type(module) for module in twin.modules()} == {
            type(module) for module in model.modules()
        }


def test_the_state_dict_is_that_of_the_model():
    model = random_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.load_state_dict(before)


def test_a_lora_adapter():
    from peft import LoraConfig, get_peft_model

    model = random_vit()
    batch = images(3).double()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["fc1", "fc2"], r=2))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).view_as(p))
    inner = adapted.base_model.model
    expected = reference(inner, batch)
    plain = output_of(adapted, batch)
    with (
        untouched(adapted),
        bs.patched(adapted, "test_time_registers", neurons=neurons_of(adapted)),
    ):
        torch.testing.assert_close(output_of(adapted, batch), expected, rtol=0, atol=TOLERANCE)
    assert (expected - plain).abs().max() > 1e-3


def test_saved_and_loaded(tmp_path):
    model = random_vit()
    batch = images(3).double()
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    bs.save_patch(model, tmp_path)
    twin = bs.load_patch(random_vit(), tmp_path)
    assert torch.equal(output_of(twin, batch), output_of(model, batch))
    assert bs.patches(twin)[0].mode == bs.patches(model)[0].mode
    with pytest.raises(Incompatible, match="layers 5, this model's is 4"):
        bs.load_patch(random_vit(depth=4), tmp_path)
