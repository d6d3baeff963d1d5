"""Every test of patching runs on a model of each kind."""

from __future__ import annotations

import pytest

import biassurgery as bs
from tests.patching.patched_models import FAMILIES, build, inputs


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


@pytest.fixture
def batch(family):
    return inputs(family)


@pytest.fixture
def sites(model, family):
    return bs.calibrate(model, [inputs(family, 1), inputs(family, 2)])
