"""The roles of tokens: which are special, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import find_host
from tests import models
from tests.adapters.unheard import UnheardAdapter


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, ("cls", "patch")),
        ({"reg_tokens": 2}, ("cls", "register:0", "register:1", "patch")),
        ({"class_token": False, "global_pool": "avg"}, ("patch",)),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 1}, ("register:0", "patch")),
    ],
)
def test_the_prefix_tokens_of_a_vision_transformer_have_roles(options, roles):
    model = models.planted_vit(**options)
    host = find_host(model)
    assert (host.roles, host.width, host.architecture) == (roles, models.HIDDEN, "timm_vit")
    codes = host.adapter.token_roles(
        model, {"pixel_values": models.images(2)}, (2, len(roles) - 1 + 16)
    )
    assert codes.tolist() == [[*range(len(roles) - 1), *[len(roles) - 1] * 16]] * 2


@pytest.mark.parametrize(
    ("mask", "positions", "wanted"),
    [
        (None, None, [0, 1, 1, 1, 1]),
        ([1, 1, 1, 0, 0], None, [0, 1, 1, PADDING, PADDING]),
        ([0, 0, 1, 1, 1], None, [PADDING, PADDING, 0, 1, 1]),
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2], [PADDING, PADDING, 0, 1, 1]),
        ([0, 0, 1, 1, 1], [1, 1, 0, 1, 2], [PADDING, PADDING, 0, 1, 1]),
        (None, [0, 1, 0, 1, 2], [0, 1, 0, 1, 1]),
        ([1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, PADDING]),
        (None, [3, 4, 5, 6, 7], [0, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0], None, [PADDING] * 5),
        ([0, 1, 0, 1, 1], None, [PADDING, 0, PADDING, 1, 1]),
    ],
)
def test_the_roles_of_tokens(mask, positions, wanted):
    batch: dict[str, Tensor] = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    if mask is not None:
        batch["attention_mask"] = torch.tensor([mask])
    if positions is not None:
        batch["position_ids"] = torch.tensor([positions])
    assert UnheardAdapter().token_roles(nn.Identity(), batch, (1, 5)).tolist() == [wanted]
