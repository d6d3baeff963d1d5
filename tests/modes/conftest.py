"""A planted model of each family."""

from __future__ import annotations

import pytest

from tests import models
from tests.modes.rewritten import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return models.planted(family)
