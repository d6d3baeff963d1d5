"""Every measure of images under patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.evaluate import (
    LinearHead,
    class_and_patch_features,
    compare,
    image_features,
    knn_accuracy,
    linear_accuracy,
    top1_accuracy,
)
from biassurgery.modes import FixRegisters, SetValue
from tests.evaluate.by_hand import by_hand_knn
from tests.models import images, planted_vit
from tests.state import untouched
from tests.tiny_vision import (
    CLASSES,
    DEPTH,
    WIDTH,
    WITH_CLS,
    linear_input,
    norm_of,
    pictures,
    split,
    tiny,
    winners,
)


def sites_of() -> bs.Sites:
    return bs.calibrate(planted_vit(), [images(8)])


def test_compare_runs_every_measure_under_every_patch() -> None:
    model = planted_vit()
    x = images(24, seed=9)
    sites = sites_of()
    half = images(24, seed=10)
    with torch.no_grad():
        said = model(x).argmax(1)
    rows = model.embed_dim
    head = LinearHead(torch.randn(5, 2 * rows), torch.randn(5))

    def evaluate(host: Any) -> dict[str, float]:
        return {
            "top1": top1_accuracy(host, [(x, said)]),
            "linear": linear_accuracy(host, [(x, said)], head),
            "knn": knn_accuracy(host, [(half, said)], [(x, said)], k=3),
        }

    with untouched(model, x):
        table = compare(model, evaluate, [None, "set_zero", "set_mean"], sites=sites)
    bs.patch_model(model, "set_zero", sites=sites)
    with torch.no_grad():
        zeroed = model(x).argmax(1)
        states = model.forward_features(x)
        linear = (
            torch.cat([states[:, 0], states[:, 1:].mean(1)], 1) @ head.weight.T + head.bias
        ).argmax(1)
        bank = image_features(model, half)
    assert table[None]["top1"] == 1.0
    assert table["set_zero"] == {
        "top1": zeroed.eq(said).double().mean().item(),
        "linear": linear.eq(said).double().mean().item(),
        "knn": (
            (torch.tensor(by_hand_knn(bank, said.tolist(), states[:, 0], 3, 0.07)) == said)
            .double()
            .mean()
            .item()
        ),
    }
    assert table["set_zero"]["top1"] < 1.0
    assert table["set_mean"]["top1"] > table["set_zero"]["top1"]
    assert "100.00 %" in str(table)


@pytest.mark.parametrize("family", ["dinov2", "hub_registers", "clip", "open_clip"])
@torch.no_grad()
def test_features_of_a_patched_model(family: str) -> None:
    model = tiny(family)
    x = pictures(4)
    values = {"channels": (3,), "positions": (0,)}
    before = image_features(model, x)
    with bs.patched(model, SetValue(500.0, **values), layers=[DEPTH - 2]):  # type: ignore[arg-type]
        changed = image_features(model, x)
        if family in WITH_CLS:
            block = find_host(model).blocks[DEPTH - 2]
            seen: list[Tensor] = []
            hook = block.register_forward_hook(
                lambda _, __, output: seen.append(
                    output if isinstance(output, Tensor) else output[0]
                )
            )
            found = class_and_patch_features(model, x, layers=4)
            hook.remove()
            assert torch.equal(seen[0][:, 0, 3], torch.full((4,), 500.0))
            assert torch.equal(
                found[:, 2 * WIDTH : 3 * WIDTH], norm_of(model)(seen[0])[:, 0]
            )  # the last block but one
    assert (changed - before).abs().max() > 0.1
    assert torch.equal(image_features(model, x), before)


def test_fixed_registers_as_in_table_5() -> None:
    model = tiny("dinov2_registers")
    x = pictures()
    means = bs.calibrate_registers(model, [pictures(16, seed=8)])
    read = linear_input("dinov2_registers", model, x, 4)
    weight = torch.randn(CLASSES, 5 * WIDTH)
    head = LinearHead(weight, -(weight @ read.float().mean(0)))
    said = winners(read @ weight.double().T + head.bias.double())
    table = compare(
        model,
        lambda host: {"linear": linear_accuracy(host, split(x, said), head)},
        [None, FixRegisters(means=means), FixRegisters("zero")],
    )
    fixed = dict[str, Tensor]()
    for fill in ("mean", "zero"):
        with bs.patched(model, "fix_registers", fill=fill, means=means):
            fixed[fill] = linear_by_library(model, x)
    agree = {
        fill: (read @ weight.T + head.bias).argmax(1).eq(torch.tensor(said)).double().mean().item()
        for fill, read in fixed.items()
    }
    assert [row.values["linear"] for row in table.rows] == [1.0, agree["mean"], agree["zero"]]
    assert agree["mean"] < 1.0
    assert agree["zero"] < 1.0


@torch.no_grad()
def linear_by_library(model: Any, x: Tensor) -> Tensor:
    """What a head of 4 layers reads, from what transformers itself returns."""
    output = model(x, output_hidden_states=True)
    normed = [*map(model.layernorm, output.hidden_states[-4:-1]), output.last_hidden_state]
    return torch.cat(
        [
            *(state[:, 0] for state in normed),
            normed[-1][:, 1 + model.config.num_register_tokens :].mean(1),
        ],
        1,
    )


@torch.no_grad()
def test_a_test_time_register_is_no_patch() -> None:
    model = tiny("timm_registers")
    x = pictures(8)
    before = class_and_patch_features(model, x, layers=4)
    neurons = bs.find_register_neurons(model, [x], count=4, layer=DEPTH - 2, threshold=0.1)
    with bs.patched(model, "test_time_registers", neurons=neurons):
        found = class_and_patch_features(model, x, layers=4)
        own = model.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
    assert own[-1][0].shape[1] == 16
    assert torch.allclose(
        found, torch.cat([*(prefix[:, 0] for _, prefix in own), own[-1][0].mean(1)], 1), atol=1e-6
    )
    assert (found - before).abs().max() > 1e-3
