"""Linear heads: published ones, fitted ones, and those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biassurgery.errors import BadOption, FileError
from biassurgery.evaluate import (
    LinearHead,
    fit_linear_head,
    image_features,
    linear_accuracy,
)
from tests.evaluate.by_hand import as_points
from tests.state import bits, untouched
from tests.tiny_vision import (
    CLASSES,
    ROWS,
    WIDTH,
    WITH_CLS,
    check,
    double,
    linear_input,
    pictures,
    split,
    tiny,
    winners,
)


def head_file(folder: Path, read: Tensor) -> Path:
    """A file as published for DINOv2, random but for its bias, which gives every class a chance on
    these features.
    """
    path = folder / "dinov2_vits14_linear_head.pth"
    weight = torch.randn(CLASSES, read.shape[1], generator=torch.Generator().manual_seed(3))
    torch.save({"weight": weight, "bias": -(weight @ read.float().mean(0))}, path)
    return path


@pytest.mark.parametrize("family", WITH_CLS)
@pytest.mark.parametrize("layers", [1, 4])
def test_published_heads(family: str, layers: int, tmp_path: Path) -> None:
    model = tiny(family)
    x = pictures()
    read = linear_input(family, model, x, layers)
    path = head_file(tmp_path, read)
    state = torch.load(path, weights_only=True)
    scores = read @ state["weight"].double().T + state["bias"].double()
    head = LinearHead.load(path)
    assert bits(head.weight) == bits(state["weight"])
    model.train()
    with untouched(model):
        check(lambda pairs: linear_accuracy(model, pairs, head), x, winners(scores))


@pytest.mark.parametrize("reads", [WIDTH, 3 * WIDTH, 4 * WIDTH, 10 * WIDTH, 2 * WIDTH + 1])
def test_a_head_of_another_model_is_refused(reads: int, tmp_path: Path) -> None:
    head = LinearHead.load(head_file(tmp_path, torch.zeros(1, reads)))
    with pytest.raises(
        BadOption,
        match=(
            rf"it reads {reads} numbers, .*width 32 that must be 64 \(layers: 1\) or 160"
            r" \(layers: 4\)"
        ),
    ):
        linear_accuracy(tiny("timm"), [(pictures(1), torch.tensor([0]))], head)


def test_heads_that_cannot_be_read(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    files: dict[str, Any] = {
        "payload": {"weight": Payload()},
        "bias": {"weight": torch.zeros(2, 3)},
        "list": [1],
        "shapes": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_text("no head")
    for name in (*files, "text", "absent"):
        with pytest.raises(FileError, match=f"{name} holds no linear head"):
            LinearHead.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_head_on_other_features() -> None:
    model = tiny("clip")
    x = pictures()
    head = LinearHead(torch.randn(CLASSES, 24), torch.randn(CLASSES))
    with torch.no_grad():
        scores = (
            image_features(double(model), x.double()) @ head.weight.double().T + head.bias.double()
        )
    check(
        lambda pairs: linear_accuracy(model, pairs, head, features=image_features),
        x,
        winners(scores),
    )
    with pytest.raises(BadOption, match="it reads 24 numbers, but the features have 2"):
        linear_accuracy(model, [(x, torch.zeros(ROWS).long())], head, features=as_points)


def test_a_fitted_head_is_at_the_minimum() -> None:
    model = tiny("dinov2")
    x = pictures(40, seed=5)
    penalty = 0.01
    labels = torch.arange(40) % 4
    with untouched(model):
        head = fit_linear_head(model, split(x, labels, (16, 16, 8)), penalty=penalty)
    read = linear_input("dinov2", model, x, 1)
    weight = head.weight.double()
    bias = head.bias.double()
    excess = torch.softmax(read @ weight.T + bias, 1) - nn.functional.one_hot(labels).double()
    assert (excess.T @ read / 40 + penalty * weight).abs().max() < 1e-4
    assert (excess.sum(0) / 40).abs().max() < 1e-4
    assert weight.norm() > 0.1
    assert (
        linear_accuracy(model, [(x, labels)], head)
        == (read @ weight.T + bias).argmax(1).eq(labels).double().mean().item()
    )
    assert (
        linear_accuracy(
            model, [(x, labels)], fit_linear_head(model, [(x, labels)], layers=4, penalty=1e-4)
        )
        == 1.0
    )
    with pytest.warns(UserWarning, match="iterations: 2 were not enough"):
        fit_linear_head(model, [(x, labels)], iterations=2)
    with pytest.raises(BadOption, match="layers: 2; use one of 1, 4"):
        fit_linear_head(model, [(x, labels)], layers=2)
    with pytest.raises(BadOption, match="penalty: 0"):
        fit_linear_head(model, [(x, labels)], penalty=0)
