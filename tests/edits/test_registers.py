"""Edits of registers."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import LevelOverflow
from tests import vision
from tests.models import HIDDEN, images


def test_registers_that_the_dtype_cannot_hold_are_an_error_after_a_cast_too() -> None:
    model = vision.planted("timm_vit")
    bs.patch_model(model, "fix_registers", means=bs.RegisterMeans(torch.full((5, 2, HIDDEN), 1e5)))
    with pytest.raises(LevelOverflow, match="float16"):
        model.half()(images(2).half())
