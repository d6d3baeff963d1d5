"""Packages of others, installed and merely importable."""

from __future__ import annotations

import pytest

from tests.adapters.conftest import THIRD_PARTY, installed  # noqa: F401


@pytest.fixture
def _alterations(monkeypatch) -> None:
    """What another package defines is known, as if a user had imported it."""
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    import alterations.biases
    import alterations.measures
    import alterations.modes  # type: ignore[import-not-found]  # noqa: F401
