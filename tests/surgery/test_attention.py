"""What a patched attention holds during a forward and afterwards, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.models import planted, tokens


def test_an_error_in_a_forward_leaves_nothing_on_the_attention(monkeypatch):
    model = bs.patch_model(planted("llama"), "attention_bias", kind="gate", std=1.0)
    projection = model.model.layers[2].self_attn.o_proj
    monkeypatch.setattr(projection, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    monkeypatch.undo()
    assert model.model.layers[2].self_attn.attention_reads == {}
    copy.deepcopy(model)


@torch.no_grad()
def test_mpt_refuses_arguments_that_it_does_not_know():
    """A cache by a new name was once taken for nothing, and every step forgot the ones before
    it.
    """
    model = planted("mpt")
    ids = tokens(1)
    with bs.patched(model, "instrument"):
        attention = model.transformer.blocks[0].attn
        kept = attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "paging": ids}), with_kwargs=True
        )
        with pytest.raises(UnsupportedModel, match="paging"):
            model(ids)
        kept.remove()
        model(ids)
