"""Arguments of models of images: those that they take get there, others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch
from tests import vision
from tests.models import images


@pytest.mark.parametrize("family", ["timm_vit", "hub_dinov2", "open_clip_vision"])
def test_what_a_model_does_not_take_is_not_dropped(family: str) -> None:
    with pytest.raises(BadBatch, match="interpolate_pos_encoding"):
        bs.calibrate(
            vision.planted(family), {"pixel_values": images(2), "interpolate_pos_encoding": True}
        )


def test_what_it_takes_gets_there() -> None:
    model = vision.planted("timm_vit")
    seen: list[Any] = []
    model.blocks[0].attn.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["attn_mask"]), with_kwargs=True
    )
    mask = torch.zeros(19, 19)
    bs.calibrate(model, {"pixel_values": images(2), "attn_mask": mask})
    assert torch.equal(seen[0], mask)
