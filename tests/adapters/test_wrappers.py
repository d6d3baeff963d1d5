"""Models inside of wrappers: torch.compile, DataParallel, PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.wrappers import unwrap
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
