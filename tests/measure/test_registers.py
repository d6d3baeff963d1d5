"""Register means: the definition applied to them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import (
    BadOption,
    CalibrationRequired,
    Incompatible,
    LayerOutOfRange,
    LevelOverflow,
    NonFiniteActivation,
    UnsupportedModel,
)
from tests import vision
from tests.findings.register_means import means
from tests.models import HIDDEN, LAYERS, images
from tests.state import output_of, untouched


def test_the_definition_on_means() -> None:
    values = torch.ones(2, 3, 5)
    values[1, 2, 4] = -2000.0
    values[1, 0, 1] = 1500.0
    values[0, 1, 1] = 900.0
    assert bs.RegisterMeans(values).massive() == [
        bs.findings.register_means.MassiveRegister(1, 2, 4, -2000.0, 2000.0),
        bs.findings.register_means.MassiveRegister(1, 0, 1, 1500.0, 1500.0),
    ]
    assert len(bs.RegisterMeans(values).massive(min_ratio=800)) == 3
    assert bs.RegisterMeans(0.01 * values).massive() == []


HUB: Any = vision.planted("hub_dinov2")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, CalibrationRequired, r"calibrate_registers\(model, images\)"),
        ({"fill": "average"}, BadOption, "fill: 'average'.*'mean'"),
        ({"fill": "noise"}, CalibrationRequired, "means"),
        ({"fill": "noise", "means": means(std=None)}, BadOption, "standard deviation"),
        ({"means": torch.zeros(5, 4, 64)}, BadOption, "means: Tensor"),
        ({"means": means(registers=3)}, Incompatible, r"\(5, 3, 64\).*\(5, 4, 64\)"),
        ({"means": means(layers=4)}, Incompatible, r"\(4, 4, 64\)"),
        ({"fill": "zero", "registers": 4}, BadOption, r"registers: \[4\].*4 registers"),
        ({"fill": "zero", "registers": [-1]}, BadOption, "registers"),
        ({"fill": "zero", "registers": "all"}, BadOption, "registers"),
        ({"fill": "zero", "cls": 1}, BadOption, "cls: 1"),
        ({"means": means(cls=None), "cls": True}, BadOption, "cls: True"),
        ({"fill": "zero", "layers": "first"}, BadOption, "layers: 'first'"),
        ({"fill": "zero", "layers": 5}, LayerOutOfRange, "5"),
        ({"fill": "zero", "sites": bs.Sites([bs.Site(0, 0, "patch", 1.0)])}, BadOption, "sites"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with untouched(HUB), pytest.raises(error, match=match):
        bs.patch_model(HUB, "fix_registers", **options)


def test_a_level_that_float16_cannot_hold() -> None:
    values = torch.zeros(LAYERS, 4, HIDDEN)
    values[3, 1, 2] = 7e4
    with pytest.raises(LevelOverflow, match="layer 3"):
        bs.patch_model(
            vision.planted("hub_dinov2").half(), "fix_registers", means=bs.RegisterMeans(values)
        )


@pytest.mark.parametrize("family", ["dinov2", "siglip_vision", "vit"])
def test_models_without_registers_say_so(family: str) -> None:
    model = vision.planted(family)
    for do in (
        lambda: bs.calibrate_registers(model, images()),
        lambda: bs.patch_model(model, "fix_registers", fill="zero"),
    ):
        with untouched(model), pytest.raises(UnsupportedModel, match="register"):
            do()


def test_resume_adds() -> None:
    batch = images(6, seed=3)
    whole = bs.calibrate_registers(HUB, batch)
    half = bs.calibrate_registers(HUB, batch[:2])
    found = bs.calibrate_registers(HUB, batch[2:], resume=half)
    torch.testing.assert_close(found.values, whole.values)
    assert (found.count, found.architecture) == (6, "hub_dinov2")
    with pytest.raises(BadOption, match="resume"):
        bs.calibrate_registers(HUB, batch, resume=whole.values)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteActivation):
        bs.calibrate_registers(HUB, batch.index_fill(0, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize("chunks", [0, 5])
def test_chunked_blocks_of_the_hub(chunks: int) -> None:
    """DINOv2 keeps its blocks in chunks where it was trained with FSDP; the same numbers come
    out.
    """
    from tests.hub_dinov2 import DinoVisionTransformer

    model = DinoVisionTransformer(
        28, 7, HIDDEN, LAYERS, 4, num_register_tokens=4, block_chunks=chunks
    ).eval()
    model.load_state_dict(dict(zip(model.state_dict(), HUB.state_dict().values())))
    assert torch.equal(output_of(model, images()), output_of(HUB, images()))
    with (
        bs.patched(model, "fix_registers", fill="zero"),
        bs.patched(HUB, "fix_registers", fill="zero"),
    ):
        assert torch.equal(output_of(model, images()), output_of(HUB, images()))


@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "fix_registers", "fill": "zero"},
        {"mode": "set_value", "value": 1.0, "channels": 1, "positions": 1, "layers": 2},
        {"mode": "attention_bias"},
    ],
    ids=lambda mode: mode["mode"],
)
def test_nested_tensors_are_refused(mode: dict[str, Any]) -> None:
    """Crops of several sizes in one forward of DINOv2: each would be edited by the numbers of the
    first, so none is.
    """
    model = vision.planted("hub_dinov2")
    crops = [images(2), images(1)]
    assert len(model(crops, is_training=True)) == 2
    bs.patch_model(model, **mode)
    if (
        mode["mode"] == "attention_bias"
    ):  # each crop goes through the attention by itself, as it should
        assert all(
            not torch.equal(a["x_prenorm"], b["x_prenorm"])
            for a, b in zip(model(crops), vision.planted("hub_dinov2")(crops))
        )
        return
    with pytest.raises(UnsupportedModel, match="one tensor of images at a time"):
        model(crops, is_training=True)


def test_a_block_that_is_skipped_in_one_batch_is_refused() -> None:
    """Its mean would be over fewer images than the others'."""
    model: Any = vision.planted("hub_dinov2")

    def batches() -> Any:
        yield images(2)
        del model.blocks[3]
        yield images(2)

    with pytest.raises(UnsupportedModel, match=r"blocks \[3\] did not run"):
        bs.calibrate_registers(model, batches())
