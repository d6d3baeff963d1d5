"""Packages of others, installed and merely importable."""

from __future__ import annotations

import pytest

from tests.adapters.conftest import THIRD_PARTY, installed  # noqa: F401


@pytest.fixture
def _alterations(monkeypatch) -> None:
    """Another package's mode `shrink` and kind of bias `output_scale` are known."""
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    import alterations.biases
    import alterations.modes  # type: ignore[import-not-found]  # noqa: F401
