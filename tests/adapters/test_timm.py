"""The options that timm's transformers are built with, each against a model whose attention is
written out in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.observe import observed
from tests.adapters.timm_variants import (
    DEPTH,
    DYNAMIC,
    HEADS,
    IMAGE,
    PATCH,
    VARIANTS,
    WIDTH,
    WrittenOut,
    biases,
    block,
    built,
    images,
    naflex,
    seeded,
    vit,
)
from tests.models import CHANNEL
from tests.state import untouched

WITHOUT_EFFECT: list[tuple[str, dict[str, Any]]] = [
    ("instrument", {}),
    ("attention_bias", {"init": "zero_effect"}),
]
ON_ATTENTION: list[tuple[str, dict[str, Any]]] = [
    ("instrument", {}),
    ("attention_bias", {}),
    ("attention_bias", {"kind": "gate"}),
]
every = pytest.mark.parametrize("name", VARIANTS)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def write(model: Any) -> Any:
    return bs.patch_model(model, "set_value", value=9.0, channels=1, positions=2, layers=[1])


def fuse(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]


@every
@torch.no_grad()
def test_explicit_bias(name: str) -> None:
    """The same whether timm fuses its attention or not: patched, both go through the core."""
    model = built(name)
    x = images()
    plain = model.forward_features(x)
    with bs.patched(model, "attention_bias", init="normal", std=2.0):
        given = biases(model)
        found = model.forward_features(x)
    assert len(given) == DEPTH
    with WrittenOut(given) as written:
        wanted = model.forward_features(x)
    assert next(written.biases, None) is None
    near(found, wanted)
    fuse(model, False)
    with bs.patched(model, "attention_bias", init="normal", std=2.0):
        for own, (key, value) in zip(
            (m for n, m in model.named_modules() if n.endswith("attention_bias_kv")),
            given,
            strict=True,
        ):
            own.k_bias.copy_(key)
            own.v_bias.copy_(value)
        assert torch.equal(model.forward_features(x), found)
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()


@every
@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_identity_and_unpatching(name: str, fused: bool) -> None:
    model = built(name)
    x = images()
    fuse(model, fused)
    plain = model(x)
    with untouched(model, x):
        for mode, options in WITHOUT_EFFECT:
            with bs.patched(model, mode, **options):
                near(model(x), plain)
    assert all(
        module.fused_attn is fused for module in model.modules() if hasattr(module, "fused_attn")
    )


@every
@torch.no_grad()
def test_roles(name: str) -> None:
    """The prefix tokens are those that the model does not count among its patches."""
    model = built(name)
    x = images()
    host = find_host(model)
    seen = []
    with observed(host, lambda layer, hidden: seen.append(hidden)):
        model(x)
    assert host.roles == (*VARIANTS[name][1], "patch")
    patches = (IMAGE // PATCH) ** 2
    assert [tuple(hidden.shape) for hidden in seen] == [
        (2, len(host.roles) - 1 + patches, WIDTH)
    ] * DEPTH
    roles = host.adapter.token_roles(host.model, {"pixel_values": x}, (2, seen[0].shape[1]))
    assert [host.roles[code] for code in roles[1]] == [*VARIANTS[name][1], *["patch"] * patches]


@every
@torch.no_grad()
def test_writing_at_positions(name: str) -> None:
    model = built(name)
    x = images()
    host = find_host(model)
    plain = []
    changed = []
    with observed(host, lambda layer, hidden: plain.append(hidden.clone())):
        model(x)
    with (
        untouched(model, x),
        bs.patched(model, "set_value", value=9.0, channels=(1, 5), positions=(0, 3), layers=[1]),
        observed(host, lambda layer, hidden: changed.append(hidden.clone())),
    ):
        model(x)
    wanted = plain[1].clone()
    wanted[:, 0, [1, 5]] = wanted[:, 3, [1, 5]] = 9.0
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[1], wanted)
    assert (changed[2] - plain[2]).abs().amax((0, 2)).min() > 0  # every token has seen it


@every
@torch.no_grad()
def test_what_is_recorded(name: str) -> None:
    """Probabilities and head outputs are the softmax, in float64, of what is recorded before it."""
    model = built(name)
    x = images()
    with bs.record(model, ("q", "k", "v", "logits", "probs", "value_updates")) as rec:
        model(x)
    masked = name.startswith(("relative", "beit"))
    for layer in range(DEPTH):
        q, k, v = (rec[what][layer] for what in "qkv")
        assert q.shape[1] == HEADS
        logits = torch.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
        away = (rec["logits"][layer] - logits).abs().max().item()
        assert away > 0.01 if masked else away < 1e-5  # relative positions are added
        probs = rec["logits"][layer].double().softmax(-1)
        torch.testing.assert_close(rec["probs"][layer].double(), probs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            rec["value_updates"][layer].sum(0), probs @ v, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", DYNAMIC)
@torch.no_grad()
def test_another_image_size(name: str) -> None:
    """A patched model reads images of other sizes and shapes than it was made for, as it does
    unpatched.
    """
    torch.manual_seed(0)
    model = seeded(DYNAMIC[name]())
    for size in ((IMAGE, IMAGE), (2 * IMAGE, IMAGE), (IMAGE - 16, IMAGE + 16)) + (
        ((IMAGE + 1, IMAGE + 5),) if "padded" in name else ()
    ):
        x = images(size=size)
        with bs.patched(model, "attention_bias", init="normal", std=2.0):
            given = biases(model)
            found = model.forward_features(x)
            with (
                bs.patched(
                    model, "set_value", value=9.0, channels=1, positions=2, layers=[DEPTH - 1]
                ),
                bs.record(model, ("block_output", "probs", "bias_mass")) as rec,
            ):
                model(x)
        with WrittenOut(given):
            near(found, model.forward_features(x))
        last = rec["block_output"][DEPTH - 1]
        patches = -(-size[0] // PATCH) * -(-size[1] // PATCH)
        assert last.shape[1] == patches + len(find_host(model).roles) - 1
        assert (last[:, 2, 1] == 9.0).all()
        total = rec["probs"][0].sum(-1) + rec["bias_mass"][0]
        torch.testing.assert_close(
            total.double(), torch.ones_like(total, dtype=torch.float64), rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_patches_of_images_of_several_shapes() -> None:
    """NaFlex batches: patches with their places, and padding, which the explicit bias does not
    change.
    """
    model = seeded(naflex(reg_tokens=2))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5)).expand(2, -1, -1)
    valid = torch.arange(20).expand(2, -1) < torch.tensor([[20], [12]])
    patches = torch.randn(
        2, 20, 3 * PATCH**2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    batch = {"patches": patches, "patch_coord": places, "patch_valid": valid}
    plain = model(batch)
    with (
        bs.patched(model, "attention_bias", init="normal", std=2.0),
        bs.record(model, ("probs", "bias_mass")) as rec,
    ):
        given = biases(model)
        found = model(batch)
    with WrittenOut(given):
        near(found, model(batch))
    assert (found - plain).abs().amax(1).min() > 1e-3
    real = torch.cat([torch.ones(2, 2, dtype=torch.bool), valid], 1)
    probs = rec["probs"][0].transpose(1, 2)[real]  # (real queries, H, keys)
    assert probs[22:, :, 14:].abs().max() == 0  # those of the second image, on its padding
    total = probs.sum(-1) + rec["bias_mass"][0].transpose(1, 2)[real]
    torch.testing.assert_close(
        total.double(), torch.ones_like(total, dtype=torch.float64), rtol=0, atol=1e-5
    )


def difference() -> Any:
    return vit(attn_layer="diff")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (difference, "DiffAttention is the difference of two attentions"),
        (
            partial(block, "DiffParallelScalingBlock"),
            "DiffParallelScalingBlock is the difference of two attentions",
        ),
        (
            partial(block, "ParallelThingsBlock"),
            "ParallelThingsBlock has several attentions side by side",
        ),
    ],
)
@torch.no_grad()
def test_attention_that_is_not_one_softmax(build: Callable[[], Any], message: str) -> None:
    """Refused before anything is changed, while modes on activations work."""
    model = seeded(build())
    x = images()
    plain = model(x)
    with untouched(model, x):
        for mode, options in ON_ATTENTION:
            with pytest.raises(UnsupportedModel, match=message):
                bs.patch_model(model, mode, **options)
        with pytest.raises(UnsupportedModel, match=message), bs.record(model, "probs"):
            pass
        write(model)
        assert (model(x) - plain).abs().max() > 1e-3
        bs.unpatch_model(model)


def test_the_distillation_token_of_deit_is_no_patch():
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2).eval()
    with torch.no_grad():
        model.dist_token[..., CHANNEL] = 1e6
    found = bs.calibrate(
        model, [torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))]
    )
    assert {site.role for site in found.at(0)} == {"distillation"}
    assert {site.count for site in found.at(0)} == {2}
