"""Models inside of wrappers: torch.compile, DataParallel, PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.wrappers import unwrap
from biassurgery.errors import UnsupportedModel
from tests import models
from tests.state import output_of


class LikePeft(nn.Module):
    """What peft.PeftModel offers: the base model, with adapters in it, somewhere inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peft_config = {"default": object()}
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self) -> nn.Module:
        return self.base_model["model"]

    def forward(self, ids: Tensor) -> Any:
        return self.base_model["model"](ids)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "PEFT": LikePeft,
    "all of them": lambda model: nn.DataParallel(LikePeft(torch.compile(model, backend="eager"))),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_found_and_patched(wrap):
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    wrapped: Any = WRAPPERS[wrap](model)
    assert unwrap(wrapped) is model
    sites = bs.calibrate(wrapped, ids)
    before = output_of(wrapped, ids)
    assert bs.patch_model(wrapped, "set_zero", sites=sites) is wrapped
    assert bs.patches(model) == bs.patches(wrapped) != ()
    assert torch.equal(output_of(wrapped, ids), output_of(model, ids))
    assert (output_of(wrapped, ids) - before).abs().max() > 0.5
    bs.unpatch_model(wrapped)
    assert torch.equal(output_of(wrapped, ids), before)


def test_the_features_of_timm_are_those_of_the_model_inside():
    """`features_only=True` stands around a vision transformer, whose blocks are what is patched."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    getter = timm.create_model(
        "vit_tiny_patch16_224",
        embed_dim=32,
        depth=3,
        num_heads=4,
        img_size=32,
        features_only=True,
        out_indices=[0, 2],
    ).eval()
    assert type(getter).__name__ == "FeatureGetterNet"
    assert unwrap(getter) is getter.model
    images = torch.randn(2, 3, 32, 32)

    def features() -> list[Tensor]:
        with torch.no_grad():
            return getter(images)

    before = features()
    written: list[Tensor] = []

    def write(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0, 5] = 300.0
        written.append(out)
        return out

    handle = getter.model.blocks[1].register_forward_hook(write)
    wanted = features()
    handle.remove()
    options = {"channels": [5], "positions": [0], "value": 300.0, "layers": [1]}
    with bs.patched(getter, "set_value", **options):
        with bs.record(getter, "block_output") as rec:
            after = features()
        assert torch.equal(rec["block_output"][1], written[0])
        assert {s.layer for s in bs.calibrate(getter, images, min_ratio=100)} == {1, 2}
    assert torch.equal(after[0], before[0])  # of the block before
    assert torch.equal(after[1], wanted[1])
    assert not torch.equal(after[1], before[1])
    assert all(map(torch.equal, features(), before))
    convolutional = timm.create_model("resnet18", features_only=True)
    with pytest.raises(UnsupportedModel, match="no attention"):
        bs.calibrate(convolutional, images)


def test_blocks_that_are_compiled_one_by_one_are_found():
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    sites = bs.calibrate(model, ids)
    before = output_of(model, ids)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    assert bs.calibrate(model, ids) == sites
    with bs.patched(model, "set_zero", sites=sites):
        assert (output_of(model, ids) - before).abs().max() > 0.5
    assert torch.equal(output_of(model, ids), before)
