"""What is no name of a file is refused as such, by everything that reads or writes one."""

from __future__ import annotations

from typing import Any

import pytest

import biassurgery as bs
from biassurgery.errors import FileError
from tests import models

NAMES: dict[str, Any] = {
    "missing": "../missing",
    "none": None,
    "number": 3,
    "too long": "x" * 5000,
    "zero byte": "\0name",
    "below a file": f"{__file__}/name",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("finding", [bs.Sites, bs.KeyValues, bs.RegisterMeans, bs.RegisterNeurons])
def test_loading_a_finding(finding: Any, name: Any) -> None:
    with pytest.raises(FileError, match=r"^path: ") as refusal:
        finding.load(name)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_loading_a_patch(name: Any) -> None:
    with pytest.raises(FileError, match=r"^(folder|path): ") as refusal:
        bs.load_patch(models.planted("llama"), name)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", [name for key, name in NAMES.items() if key != "missing"])
def test_writing(name: Any) -> None:
    model = models.planted("llama")
    sites = bs.calibrate(model, models.tokens(rows=2))
    bs.patch_model(model, "set_mean", sites=sites)
    with pytest.raises(FileError):
        sites.save(name)
    with pytest.raises(FileError):
        bs.save_patch(model, name)
