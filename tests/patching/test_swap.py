"""Blocks whose class or forward cannot be swapped."""

from __future__ import annotations

import pytest
from torch import nn

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import edits_of
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
            with pytest.raises(UnsupportedModel, match=r"forward.*block 3"):
                call()


def test_a_child_of_the_same_name_is_passed_over(model, family, batch, sites):
    block = models.blocks(model, family)[2]
    own = nn.Identity()
    block.add_module("activation_edit_0", own)
    with untouched(model, batch):
        bs.patch_model(model, "set_zero", sites=sites, layers="all")
        assert isinstance(block.activation_edit_1, BlockEdit)
        bs.unpatch_model(model)
        assert block.activation_edit_0 is own


def test_edits_of_an_unpatched_block_are_none(model, family):
    assert [edits_of(block) for block in models.blocks(model, family)] == [()] * 5
