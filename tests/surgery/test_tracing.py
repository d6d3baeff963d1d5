"""torch.fx cannot trace a patched model, and says so; torch.compile and torch.export can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.state import untouched

timm = pytest.importorskip("timm")
SITES = bs.Sites([bs.Site(1, 5, "cls", 300.0, gate=0.01)])
PATCHES: dict[str, dict[str, Any]] = {
    "set_mean": {"sites": SITES},
    "instrument": {},
    "attention_bias": {"kind": "kv"},
}


@pytest.mark.parametrize("mode", PATCHES)
def test_a_trace_of_a_patched_model_is_refused_with_the_reason(mode: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=32
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    with untouched(model), bs.patched(model, mode, **PATCHES[mode]):
        with pytest.raises(UnsupportedModel, match=r"torch\.fx traces.*torch\.export"):
            torch.fx.symbolic_trace(model)
        with torch.no_grad():
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
