"""A model of each kind, its sites, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import biassurgery as bs
from tests import models

FAMILIES = ("llama", "gpt2", "timm")


def build(family: str) -> Any:
    return models.planted_vit() if family == "timm" else models.planted(family)


def inputs(family: str, seed: int = 9) -> torch.Tensor:
    return models.images(3, seed) if family == "timm" else models.tokens(rows=3, seed=seed)


def names(model: nn.Module) -> list[str]:
    return [patch.mode.name for patch in bs.patches(model)]
