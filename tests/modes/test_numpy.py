"""Numbers and indices of numpy as options."""

from __future__ import annotations

import json

import numpy as np
import pytest

import biassurgery as bs
from biassurgery.modes import Noise
from tests.models import LAYER, planted, tokens

LATER = LAYER + 1


@pytest.fixture(scope="module")
def sites() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens()])


def test_numbers_and_indices_of_numpy(sites, tmp_path):
    model = bs.patch_model(
        planted("llama"),
        "set_value",
        sites=sites,
        value=np.float32(50),
        layers=np.array([LAYER, LATER]),
    )
    bs.save_patch(model, tmp_path)
    (saved,) = json.loads((tmp_path / "surgery.json").read_text())["patches"]
    assert saved["options"]["value"] == 50
    assert saved["layers"] == [LAYER, LATER]
    assert type(Noise(scale=np.float32(2)).scale) is float
