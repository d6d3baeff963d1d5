"""Packages of others, installed and merely importable."""

from __future__ import annotations

import pytest

from tests.adapters.conftest import installed  # noqa: F401


@pytest.fixture
def _alterations() -> None:
    """What another package defines is known, as if a user had imported it."""
    import alterations.biases
    import alterations.measures
    import alterations.modes  # type: ignore[import-not-found]  # noqa: F401
