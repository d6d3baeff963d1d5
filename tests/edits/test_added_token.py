"""Test-time registers against plain hooks in float64, one image at a time, and on a trained ViT-Ti
(Jiang et al. 2025).
"""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.edits.added_token import AddToken, NeuronEdit
from biassurgery.findings.register_neurons import RegisterNeuron
from biassurgery.surgery.block import added_tokens
from tests import models, vision
from tests.models import (
    CHANNEL,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYER,
    LAYERS,
    PATCH,
    PATCHES,
    START_ID,
    images,
    planted_vit,
)
from tests.state import output_of, untouched

NEURONS = {0: [3, 7], 2: [5, 0, 31], LAYERS - 1: [12]}
TOLERANCE = 1e-11  # float64
ADDABLE = [family for family in vision.FAMILIES if family != "timm_relative"]


def neurons_of(model: Any, neurons: dict[int, list[int]] | None = None) -> bs.RegisterNeurons:
    """Hand-made register neurons for a model."""
    host = find_host(model)
    found = tuple(
        RegisterNeuron(layer, neuron, 1.0)
        for layer, some in (neurons or NEURONS).items()
        for neuron in some
    )
    return bs.RegisterNeurons(found, host.architecture, len(host.blocks), host.width, 1, 10.0, 1, 1)


def random_vit(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small timm ViT in which every part has an effect."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        **{
            "img_size": IMAGE,
            "patch_size": PATCH,
            "embed_dim": HIDDEN,
            "depth": LAYERS,
            "num_heads": HEADS,
            "num_classes": 5,
        }
        | options
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.12)
    return model.to(dtype)


def by_hooks(
    model: Any,
    blocks: list[nn.Module],
    linears: list[nn.Module],
    image: Tensor,
    neurons: dict[int, list[int]],
    position: int,
) -> Tensor:
    """The output for one image (1, 3, H, W), by forward hooks on a model that nothing is patched
    on.
    """

    def add(_: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        longer = torch.cat(
            [
                hidden[:, :position],
                torch.zeros(1, 1, hidden.shape[-1], dtype=hidden.dtype),
                hidden[:, position:],
            ],
            dim=1,
        )
        return (
            ((longer, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": longer})
        )

    def drop(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        shorter = torch.stack(
            [token for index, token in enumerate(hidden[0]) if index != position]
        )[None]
        return shorter if isinstance(output, Tensor) else (shorter, *output[1:])

    def move(some: list[int], args: Any) -> Any:
        x = args[0].clone()
        for neuron in some:
            values = x[0, :, neuron].tolist()
            x[0, :, neuron] = 0.0
            x[0, position, neuron] = max(values, key=abs)
        return (x, *args[1:])

    hooks = [
        blocks[0].register_forward_pre_hook(add, with_kwargs=True),
        blocks[-1].register_forward_hook(drop),
    ]
    hooks += [
        linears[layer].register_forward_pre_hook(lambda _, args, some=some: move(some, args))
        for layer, some in neurons.items()
    ]
    output = output_of(model, image)
    for hook in hooks:
        hook.remove()
    return output


def reference(
    model: Any, batch: Tensor, neurons: dict[int, list[int]] | None = None, position: int = 1
) -> Tensor:
    """The outputs of a timm ViT, image by image."""
    linears = [block.mlp.fc2 for block in model.blocks]
    return torch.cat(
        [
            by_hooks(model, list(model.blocks), linears, image, neurons or NEURONS, position)
            for image in batch.split(1)
        ]
    )


# -- the patch


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
    with untouched(model), pytest.raises(bs.UnsupportedModel, match="relative positions"):
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


def pickle_and_back(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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
    with pytest.raises(bs.IncompatibleSites, match="layers 5, this model's is 4"):
        bs.load_patch(random_vit(depth=4), tmp_path)


# -- together with others


@pytest.mark.parametrize(
    ("options", "position"),
    [({}, 1), ({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)],
    ids=str,
)
def test_record_sees_the_token_in_every_block_behind_the_prefix(options, position):
    model = random_vit(**options)
    batch = images(3).double()
    tokens = position + 1 + (IMAGE // PATCH) ** 2
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    output = output_of(model, batch)
    with bs.record(model, ("block_input", "block_output", "probs")) as rec:
        assert torch.equal(output_of(model, batch), output)
    for layer in range(LAYERS):
        assert (
            rec["block_input"][layer].shape
            == rec["block_output"][layer].shape
            == (3, tokens, HIDDEN)
        )
        assert rec["probs"][layer].shape == (3, HEADS, tokens, tokens)
    assert (~rec["block_input"][0].any(-1)).nonzero().tolist() == [
        [row, position] for row in range(3)
    ]
    assert torch.equal(rec["block_input"][1], rec["block_output"][0])
    assert added_tokens(model.blocks[0]) == 1


OTHERS: dict[str, dict[str, Any]] = {
    "set_zero": {},
    "instrument": {},
    "attention_bias": {"kind": "sink_logit"},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_beside_another_patch(other, first):
    model = planted_vit(torch.float64)
    batch = images(3).double()
    neurons = {LAYER: [START_ID]}
    options: dict[str, Any] = OTHERS[other]
    sites = bs.Sites([bs.Site(LAYER, CHANNEL, "patch", 3000.0, gate=500.0)])

    def on(name: str) -> None:
        torch.manual_seed(5)
        given = {"sites": sites} if name == "set_zero" else options
        bs.patch_model(
            model,
            name,
            **({"neurons": neurons_of(model, neurons)} if name == "test_time_registers" else given),
        )

    names = ["test_time_registers", other] if first else [other, "test_time_registers"]
    with untouched(model, batch):
        alone = {}
        for name in names:
            on(name)
            alone[name] = output_of(model, batch)
            bs.unpatch_model(model)
        for name in names:
            on(name)
        both = output_of(model, batch)
        if other == "instrument":
            torch.testing.assert_close(both, alone["test_time_registers"], rtol=0, atol=1e-9)
        else:
            assert min((both - output).abs().max() for output in alone.values()) > 1e-6
        bs.unpatch_model(model, names[0])
        assert torch.equal(output_of(model, batch), alone[names[1]])
        bs.unpatch_model(model, names[1])


def test_the_massive_activation_is_fixed_where_it_has_gone():
    model = planted_vit()
    batch = images(3)
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model, {LAYER: [START_ID]}))
    bs.patch_model(
        model,
        "set_value",
        value=0.0,
        sites=bs.Sites([bs.Site(LAYER, CHANNEL, "patch", 3000.0, gate=500.0)]),
    )
    with bs.record(model, "block_output", layers=[LAYER]) as rec:
        model(batch)
    assert rec["block_output"][LAYER][..., CHANNEL].abs().max() < 500
    assert not rec["block_output"][LAYER][:, 1, CHANNEL].any()


# -- finding the neurons


def captured(model: Any, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What every second MLP layer reads, and what every block returns."""
    read: list[Tensor] = []
    returned: list[Tensor] = []
    hooks = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for block in model.blocks
    ]
    hooks += [
        block.register_forward_hook(lambda _, __, output: returned.append(output))
        for block in model.blocks
    ]
    output_of(model, batch)
    for hook in hooks:
        hook.remove()
    return read, returned


def by_loop(
    model: Any, batch: Tensor, layer: int, threshold: float, prefix: int
) -> tuple[dict[tuple[int, int], float], int, int]:
    """Algorithm 1, one image at a time: the score of each neuron, images and outlier tokens."""
    scores: dict[tuple[int, int], list[float]] = {}
    tokens = 0
    for image in batch.split(1):
        read, returned = captured(model, image)
        outliers = [
            t
            for t in range(prefix, returned[layer].shape[1])
            if math.sqrt(sum(v * v for v in returned[layer][0, t].tolist())) > threshold
        ]
        tokens += len(outliers)
        for index in range(layer + 1 if outliers else 0):
            for neuron in range(read[index].shape[-1]):
                values = [abs(read[index][0, t, neuron].item()) for t in outliers]
                scores.setdefault((index, neuron), []).append(sum(values) / len(values))
    counts = {len(values) for values in scores.values()}
    return (
        {place: sum(values) / len(values) for place, values in scores.items()},
        counts.pop(),
        tokens,
    )


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=str)
def test_the_planted_neuron_is_found(options):
    model = planted_vit(torch.float64, **options)
    batch = images(6).double()
    prefix = 1 + options.get("reg_tokens", 0)
    with untouched(model, batch):
        found = bs.find_register_neurons(model, [batch[:4], batch[4:]], count=4)
    assert found.outlier_layer == LAYER
    assert (found.images, found.tokens) == (6, 6 * len(PATCHES))
    assert found.neurons[0][:2] == (LAYER, START_ID)
    assert (found.architecture, found.layers, found.width) == ("timm_vit", LAYERS, HIDDEN)
    scores, *counts = by_loop(model, batch, LAYER, found.threshold, prefix)
    assert counts == [6, 6 * len(PATCHES)]
    assert [(each.layer, each.neuron) for each in found.neurons] == sorted(
        scores, key=lambda place: -scores[place]
    )[:4]
    for each in found.neurons:
        assert each.activation == pytest.approx(scores[each.layer, each.neuron], rel=1e-6)
    assert found.by_layer()[LAYER][0] == START_ID
    assert found.first(1).neurons == found.neurons[:1]

    norms = torch.stack(
        [hidden[:, prefix:].norm(dim=-1) for hidden in captured(model, batch)[1]]
    )  # (L, B, patches)
    assert found.threshold == pytest.approx(
        math.sqrt(norms[LAYER].median() * norms[LAYER].amax(1).mean()), rel=1e-5
    )


def test_the_massive_activation_moves_to_the_token():
    model = planted_vit()
    batch = images(6)
    before = captured(model, batch)[1][LAYER][:, 1:, CHANNEL]
    assert before.abs().amax(1).min() > 2000
    bs.patch_model(
        model, "test_time_registers", neurons=bs.find_register_neurons(model, batch, count=1)
    )
    with bs.record(model, "block_output") as rec:
        model(batch)
    for layer in range(LAYER, LAYERS):
        values = rec["block_output"][layer][..., CHANNEL].abs()
        assert values[:, 1].min() > 1500
        assert values.index_select(1, torch.tensor([0, *range(2, values.shape[1])])).max() < 300


def test_means_over_images_are_of_those_with_outliers():
    model = random_vit()
    batch = images(8).double()
    norms = captured(model, batch)[1][2][:, 1:].norm(dim=-1)
    threshold = (
        norms.amax(1).sort().values[3:5].mean().item()
    )  # four of the eight images are beyond it
    found = bs.find_register_neurons(
        model,
        [(images(8).double()[i : i + 1], torch.zeros(1)) for i in range(8)],
        count=5,
        layer=2,
        threshold=threshold,
    )
    scores, images_with, tokens = by_loop(model, batch, 2, threshold, 1)
    assert (found.images, found.tokens) == (images_with, tokens)
    assert images_with == 4
    for each, place in zip(found.neurons, sorted(scores, key=lambda place: -scores[place])):
        assert (each.layer, each.neuron) == place
        assert each.activation == pytest.approx(scores[place], rel=1e-6)


def test_a_generator_is_read_once():
    model = planted_vit()
    batch = images(40)
    wanted = bs.find_register_neurons(model, batch.split(8))
    assert bs.find_register_neurons(model, (each for each in batch.split(8))) == wanted
    assert wanted.images == 40
    assert len(wanted.neurons) == 10


def test_a_printed_table():
    model = planted_vit()
    text = str(bs.find_register_neurons(model, images(3), count=2))
    assert "Register neurons" in text
    assert "at 9 outlier tokens of 3 images" in text
    assert f"block {LAYER}" in text


def test_neurons_in_a_file(tmp_path):
    neurons = neurons_of(random_vit())
    neurons.save(tmp_path / "neurons.safetensors")
    assert bs.RegisterNeurons.load(tmp_path / "neurons.safetensors") == neurons
    bs.Sites().save(tmp_path / "sites.safetensors")
    with pytest.raises(bs.FileError, match=r"pass a file written by RegisterNeurons\.save"):
        bs.RegisterNeurons.load(tmp_path / "sites.safetensors")
    with pytest.raises(bs.FileError, match="not a file"):
        bs.RegisterNeurons.load(tmp_path / "absent.safetensors")


# -- refusals


def test_a_model_without_outlier_tokens():
    model = random_vit(torch.float32)
    with (
        untouched(model),
        pytest.raises(bs.UnsupportedModel, match="no outlier tokens: the largest patch norm"),
    ):
        bs.find_register_neurons(model, images(4))
    with untouched(model), pytest.raises(bs.UnsupportedModel, match="no outlier tokens at block 2"):
        bs.find_register_neurons(model, images(4), layer=2)
    with untouched(model), pytest.raises(bs.BadOption, match="threshold: 1e\\+06, but no patch"):
        bs.find_register_neurons(model, images(4), layer=2, threshold=1e6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, bs.BadOption, "count: 0"),
        ({"count": 2.5}, bs.BadOption, "count: 2.5"),
        ({"count": True}, bs.BadOption, "count: True"),
        ({"count": 10**6}, bs.BadOption, "only 512 neurons up to block 1"),
        ({"layer": LAYERS}, bs.LayerOutOfRange, "blocks 0 to 4"),
        ({"layer": "last"}, bs.BadOption, "layer: 'last'"),
        ({"threshold": -1.0}, bs.BadOption, "threshold: -1.0"),
        ({"threshold": float("nan")}, bs.BadOption, "threshold: nan"),
    ],
)
def test_options_of_the_search(options, error, message):
    model = planted_vit()
    with untouched(model), pytest.raises(error, match=message):
        bs.find_register_neurons(model, images(3), **options)


def test_text_models_are_refused():
    model = models.planted("llama")
    neurons = neurons_of(random_vit())
    with untouched(model), pytest.raises(bs.UnsupportedModel, match="reads text; register neurons"):
        bs.find_register_neurons(model, models.tokens())
    with (
        untouched(model),
        pytest.raises(bs.UnsupportedModel, match="reads text; test-time registers"),
    ):
        bs.patch_model(model, "test_time_registers", neurons=neurons)


def test_bad_images():
    model = planted_vit()
    with untouched(model), pytest.raises(bs.BadBatch, match="there are none"):
        bs.find_register_neurons(model, [])
    with untouched(model), pytest.raises(bs.NonFiniteActivation, match="NaN"):
        bs.find_register_neurons(model, images(3).log())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"architecture": "vit"},
            bs.IncompatibleSites,
            "architecture is 'vit', this one's is 'timm_vit'",
        ),
        ({"layers": 12}, bs.IncompatibleSites, "number of layers is 12"),
        ({"width": 192}, bs.IncompatibleSites, "hidden size is 192"),
        (
            {"neurons": (RegisterNeuron(1, 256, 1.0),)},
            bs.IncompatibleSites,
            "256 of layer 1 is outside the 256",
        ),
        (
            {"neurons": (RegisterNeuron(5, 0, 1.0),)},
            bs.IncompatibleSites,
            r"layer=5, .* whose blocks are 0 to 4",
        ),
        ({"neurons": (RegisterNeuron(0, -1, 1.0),)}, bs.IncompatibleSites, "neuron=-1"),
        ({"neurons": ()}, bs.BadOption, "there are none"),
    ],
)
def test_neurons_of_another_model(change, error, message):
    model = random_vit()
    with untouched(model), pytest.raises(error, match=message):
        bs.patch_model(model, "test_time_registers", neurons=replace(neurons_of(model), **change))


def test_what_the_mode_does_not_take():
    model = random_vit()
    neurons = neurons_of(model)
    with untouched(model):
        with pytest.raises(bs.BadOption, match="needs neurons="):
            bs.patch_model(model, "test_time_registers")
        with pytest.raises(bs.BadOption, match="neurons: list; pass what find_register_neurons"):
            bs.patch_model(model, "test_time_registers", neurons=[(1, 2)])
        with pytest.raises(bs.BadOption, match="does not use any"):
            bs.patch_model(
                model,
                "test_time_registers",
                neurons=neurons,
                sites=bs.Sites([bs.Site(0, 1, "patch", 5.0)]),
            )
        with pytest.raises(bs.BadOption, match="leave layers= out"):
            bs.patch_model(model, "test_time_registers", neurons=neurons, layers=[1])
        bs.patch_model(model, "test_time_registers", neurons=neurons)
        for again in (neurons, neurons.first(1)):
            with pytest.raises(
                bs.AlreadyPatched, match="test-time register is on the model already"
            ):
                bs.patch_model(model, "test_time_registers", neurons=again)
        with pytest.raises(bs.AlreadyPatched, match="where its outlier tokens have gone"):
            bs.find_register_neurons(model, images(3).double())
        bs.unpatch_model(model)


def test_tokens_on_another_axis():
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        width=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        mlp_ratio=2,
        output_dim=5,
    )
    for module in model.modules():
        if "batch_first" in vars(module):
            module.batch_first = False  # type: ignore[assignment]
    with untouched(model), pytest.raises(bs.UnsupportedModel, match="axes TBD"):
        bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))


def test_a_replaced_forward_is_refused():
    model = random_vit()
    linear: Any = model.blocks[0].mlp.fc2
    linear.forward = lambda x: x
    with (
        untouched(model),
        pytest.raises(bs.UnsupportedModel, match="forward` of the second linear layer"),
    ):
        bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))


def test_a_failure_half_way_leaves_no_trace(monkeypatch):
    model = vision.planted("timm_eva")
    neurons = neurons_of(model)
    attach = NeuronEdit.attach

    def fails(self: NeuronEdit, module: nn.Module) -> None:
        attach(self, module)
        if 31 in self.neurons:
            raise KeyboardInterrupt

    counts = [block.attn.num_prefix_tokens for block in model.blocks]
    with untouched(model, images(2)):
        monkeypatch.setattr(NeuronEdit, "attach", fails)
        with pytest.raises(KeyboardInterrupt):
            bs.patch_model(model, "test_time_registers", neurons=neurons)
        monkeypatch.undo()
    assert [block.attn.num_prefix_tokens for block in model.blocks] == counts
    assert AddToken(1)(torch.ones(2, 3, 4)).sum(2).tolist() == [[4, 0, 4, 4]] * 2


# -- a trained model

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg" / "vit_tiny_patch16_224.safetensors"
IMAGENET = SHARED / "images" / "imagenet_sample_200"
CORNERS = torch.tensor([1, 14, 183, 196])
MASSIVE_LAYER = 7
MASSIVE_CHANNEL = 41


@pytest.mark.skipif(
    not (VIT.is_file() and IMAGENET.is_dir()),
    reason="the folder `shared` beside the repository, with trained weights and images, is absent",
)
def test_a_trained_vit_keeps_its_accuracy_and_loses_its_outliers():
    import timm
    from safetensors.torch import load_file

    from biassurgery.data.reading import ImageBatches, image_files

    model: Any = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(VIT))
    files = image_files(IMAGENET, 1000)
    neurons = bs.find_register_neurons(model, ImageBatches(files[:100:2], model, 25))
    assert neurons.outlier_layer == MASSIVE_LAYER
    assert neurons.tokens == pytest.approx(4 * 50, abs=8)
    assert neurons.neurons[0][:2] == (MASSIVE_LAYER, 417)
    assert neurons.neurons[0].activation > 10 * neurons.neurons[1].activation

    odd = list(ImageBatches(files[1::2], model, 50))
    labels = torch.cat([each for _, each in odd])

    def run() -> tuple[float, Tensor]:
        with torch.no_grad(), bs.record(model, "block_output", layers=[MASSIVE_LAYER]) as rec:
            logits = [
                (model(pixels), rec["block_output"][MASSIVE_LAYER])[0] for pixels, _ in odd[:1]
            ]
            hidden = rec["block_output"][MASSIVE_LAYER]
        with torch.no_grad():
            logits += [model(pixels) for pixels, _ in odd[1:]]
        return (torch.cat(logits).argmax(1) == labels).float().mean().item(), hidden

    before, hidden = run()
    assert before == pytest.approx(0.86, abs=1e-6)
    assert hidden[:, CORNERS, MASSIVE_CHANNEL].mean() < -400
    with bs.patched(model, "test_time_registers", neurons=neurons):
        after, moved = run()
    assert after == pytest.approx(before, abs=0.0101)
    assert moved.shape[1] == hidden.shape[1] + 1
    assert moved[:, 1, MASSIVE_CHANNEL].mean() < -200
    patches = moved[:, 2:]
    assert patches[..., MASSIVE_CHANNEL].abs().max() < 30
    assert patches.norm(dim=-1).max() < 30
    assert hidden[:, CORNERS].norm(dim=-1).mean() > 400
