"""Blocks of timm that are their own attention: norms, projections and softmax in one module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.adapters.timm_variants import (
    PARALLEL,
    built,
    images,
)
from tests.state import untouched


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def write(model: Any) -> Any:
    return bs.patch_model(model, "set_value", value=9.0, channels=1, positions=2, layers=[1])


def bias(model: Any) -> Any:
    torch.manual_seed(5)
    return bs.patch_model(model, "attention_bias", init="normal", std=2.0)


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize(("first", "second"), [(write, bias), (bias, write)])
@pytest.mark.parametrize("leaves", ["set_value", "attention_bias"])
@torch.no_grad()
def test_a_block_with_edits_of_itself_and_of_its_attention(
    name: str, first: Any, second: Any, leaves: str
) -> None:
    """In either order, and either comes off first; each alone is what it is without the other."""
    model = built(name)
    x = images()
    alone = {"set_value": write(built(name))(x), "attention_bias": bias(built(name))(x)}
    with untouched(model, x):
        both = second(first(model))(x)
        assert [patch.mode.name for patch in bs.patches(model)] == [
            "set_value" if step is write else "attention_bias" for step in (first, second)
        ]
        with bs.record(model, ("block_output", "bias_mass")) as rec:
            assert torch.equal(model(x), both)
        assert (rec["block_output"][1][:, 2, 1] == 9.0).all()
        assert rec["bias_mass"][1].amin() > 0
        assert all((both - other).abs().max() > 1e-3 for other in alone.values())
        bs.unpatch_model(model, leaves)
        assert torch.equal(
            model(x), alone["attention_bias" if leaves == "set_value" else "set_value"]
        )
        bs.unpatch_model(model)


@torch.no_grad()
def test_copies_and_files_of_such_a_block(tmp_path: Any) -> None:
    model = built("parallel")
    x = images()
    plain = model(x)
    bias(write(model))
    both = model(x)
    bs.save_patch(model, tmp_path)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        bs.load_patch(built("parallel"), tmp_path),
    ):
        assert torch.equal(twin(x), both)
        assert torch.equal(bs.unpatch_model(twin)(x), plain)
        assert type(twin.blocks[1]) is type(built("parallel").blocks[1])
    assert torch.equal(model(x), both)


@torch.no_grad()
def test_compiling_such_a_block() -> None:
    torch._dynamo.reset()
    model = built("parallel")
    x = images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(x)
    near(plain, model(x))
    for patch in (bias, write):
        patch(model)
        near(compiled(x), model(x))
        assert (compiled(x) - plain).abs().max() > 1e-3
    bs.unpatch_model(model)
    assert torch.equal(compiled(x), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PARALLEL)
def test_what_such_an_attention_reads_is_not_at_hand(name: str) -> None:
    model = built(name)
    x = images()
    with untouched(model, x):
        with pytest.raises(UnsupportedModel, match="share their projections"):
            bs.patch_model(model, "attention_bias", kind="gate")
        for what in ("norm_output", "attention_output"):
            with (
                pytest.raises(UnsupportedModel, match="share their projections"),
                bs.record(model, what),
            ):
                pass
    assert bs.detect(model, x).sinks is not None  # whose statistics need the softmax alone
