"""Models of images are calibrated on the packaged photographs."""

from __future__ import annotations

import pytest

import biassurgery as bs
from biassurgery.errors import NoSites


def test_naflex_calibrates_on_the_packaged_photographs() -> None:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    model = NaFlexVit(NaFlexVitCfg(patch_size=16, embed_dim=32, depth=2, num_heads=2)).eval()
    with pytest.warns(UserWarning, match="packaged photographs"), pytest.raises(NoSites):
        bs.patch_model(model, "set_zero")
