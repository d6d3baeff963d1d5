"""Test-time registers against plain hooks in float64, one image at a time, and on a trained ViT-Ti
(Jiang et al. 2025).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.edits.added_token import NeuronEdit
from biassurgery.errors import UnsupportedModel
from tests import vision
from tests.edits.plain_hooks import (
    NEURONS,
    TOLERANCE,
    by_hooks,
    neurons_of,
    pickle_and_back,
    random_vit,
    reference,
)
from tests.models import (
    images,
)
from tests.state import output_of, untouched

ADDABLE = [family for family in vision.FAMILIES if family != "timm_relative"]


@pytest.mark.parametrize(
    ("options", "position"),
    [
        ({}, 1),
        ({"reg_tokens": 2, "no_embed_class": True}, 3),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"global_pool": "avg"}, 1),
        ({"init_values": 0.5, "pre_norm": True}, 1),
        ({"depth": 1}, 1),
    ],
    ids=str,
)
def test_a_batch_equals_plain_hooks_image_by_image(options, position):
    model = random_vit(**options)
    batch = images(4).double()
    neurons = {0: [3, 7]} if "depth" in options else NEURONS
    plain = output_of(model, batch)
    expected = reference(model, batch, neurons, position)
    with (
        untouched(model, batch),
        bs.patched(model, "test_time_registers", neurons=neurons_of(model, neurons)),
    ):
        found = output_of(model, batch)
    assert found.shape == plain.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - plain).abs().amax(1).min() > 1e-3
    token_only = reference(model, batch, {0: []}, position)
    assert (found - token_only).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("family", ADDABLE)
def test_every_family_equals_plain_hooks(family):
    model = vision.planted(family).double()
    batch = images(2).double()
    position = vision.FAMILIES[family].prefix
    kind = vision.FAMILIES[family]
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module).__name__ == "EvaAttention":
            module.num_prefix_tokens += 1
    blocks = vision.blocks(twin, family)
    linears = [vision.first(block, kind.writer) for block in blocks]
    expected = torch.cat(
        [by_hooks(twin, blocks, linears, image, NEURONS, position) for image in batch.split(1)]
    )
    with (
        untouched(model, batch),
        bs.patched(model, "test_time_registers", neurons=neurons_of(model)),
    ):
        found = output_of(model, batch)
    assert found.shape == output_of(model, batch).shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - output_of(model, batch)).abs().max() > 1e-6


def test_rotary_attention_counts_the_token_while_patched_only():
    model = vision.planted("timm_eva")
    counts = [block.attn.num_prefix_tokens for block in model.blocks]
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    twin = pickle_and_back(copy.deepcopy(model))
    for each in (model, twin):
        assert [block.attn.num_prefix_tokens for block in each.blocks] == [
            count + 1 for count in counts
        ]
        bs.unpatch_model(each)
        assert [block.attn.num_prefix_tokens for block in each.blocks] == counts


def test_relative_positions_are_refused():
    model = vision.planted("timm_relative")
    with untouched(model), pytest.raises(UnsupportedModel, match="relative positions"):
        bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))


def test_the_largest_by_magnitude_keeps_its_sign():
    x = torch.tensor(
        [
            [[1.0, -7.0, 0.5], [2.0, 3.0, 0.5], [-1.0, 5.0, 9.0]],
            [[0.0, 0.0, 1.0], [-4.0, 0.0, 1.0], [3.0, 0.0, 1.0]],
        ]
    )
    kept = x.clone()
    moved = NeuronEdit([0, 1], 1)(x)
    assert torch.equal(x, kept)
    assert moved.tolist() == [
        [[0, 0, 0.5], [2, -7, 0.5], [0, 0, 9]],
        [[0, 0, 1], [-4, 0, 1], [0, 0, 1]],
    ]


def test_the_added_token_counts_among_the_tokens():
    x = torch.zeros(1, 3, 1)
    x[0, 1] = 5.0
    assert NeuronEdit([0], 1)(x).flatten().tolist() == [0, 5, 0]


def test_gradients_are_those_of_plain_hooks():
    model = random_vit()
    batch = images(3).double()
    twin = copy.deepcopy(model)
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    weights = torch.randn(3, 5, dtype=torch.float64)
    (model(batch) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for image, weight in zip(batch.split(1), weights):
        one = copy.deepcopy(twin)  # differentiable: output_of is not
        (differentiable(one, image) * weight).sum().backward()
        for name, p in one.named_parameters():
            found[name] = found[name] - p.grad
    assert max(difference.abs().max().item() for difference in found.values()) < 1e-9
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def differentiable(model: Any, image: Tensor) -> Tensor:
    """What `reference` is, with gradients."""
    x = model._pos_embed(model.patch_embed(image))
    x = torch.cat([x[:, :1], torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
    for layer, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x))
        inner = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        columns = list(inner.unbind(-1))
        for neuron in NEURONS.get(layer, ()):
            values = columns[neuron][0]
            new = torch.zeros_like(values)
            new[1] = values[values.abs().argmax()]
            columns[neuron] = new[None]
        x = x + block.mlp.fc2(torch.stack(columns, -1))
    return model.forward_head(model.norm(torch.cat([x[:, :1], x[:, 2:]], 1)))
