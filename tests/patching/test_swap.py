"""Blocks whose class or forward cannot be swapped."""

from __future__ import annotations

import pytest
from torch import nn

import biassurgery as bs
from biassurgery.surgery import block as surgery
from biassurgery.surgery.swap import edits_of
from tests import models
from tests.state import untouched


def test_a_forward_replaced_on_the_object_is_refused(model, family, batch, sites):
    block = models.blocks(model, family)[3]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with untouched(model, batch):
        for call in (
            lambda: bs.patch_model(model, "set_zero", sites=sites),
            lambda: bs.calibrate(model, batch),
        ):
            with pytest.raises(bs.UnsupportedModel, match=r"forward.*block 3"):
                call()


def test_a_child_of_the_same_name_is_refused(model, family, batch, sites):
    models.blocks(model, family)[2].add_module(surgery.NAME, nn.Identity())
    with (
        untouched(model, batch),
        pytest.raises(bs.UnsupportedModel, match=r"block 2.*activation_edits"),
    ):
        bs.patch_model(model, "set_zero", sites=sites)


def test_edits_of_an_unpatched_block_are_none(model, family):
    assert [edits_of(block) for block in models.blocks(model, family)] == [()] * 5
