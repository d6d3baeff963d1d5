"""What the figures of images and of magnitudes are drawn from."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from tests.models import (
    KEYS,
    START_ID,
    images,
    planted_vit,
)


@pytest.fixture(scope="module")
def detection():
    """Planted patches, and [CLS]."""
    model = planted_vit()
    with torch.no_grad():
        model.cls_token[0, 0, KEYS[START_ID]] = 4.0
    return bs.detect(model, [images(6)])
