"""Applying, stacking and removing patches: what is left behind is nothing."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.surgery import edit as surgery
from biassurgery.surgery.block import BlockEdit, EditedBlock, hidden_of
from biassurgery.surgery.edit import Edit, edits_of
from biassurgery.surgery.swap import host_class
from tests import models
from tests.models import CHANNEL, LAYER
from tests.state import output_of, untouched

FAMILIES = ("llama", "gpt2", "timm")


def build(family: str) -> Any:
    return models.planted_vit() if family == "timm" else models.planted(family)


def inputs(family: str, seed: int = 9) -> torch.Tensor:
    return models.images(3, seed) if family == "timm" else models.tokens(rows=3, seed=seed)


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


def names(model: nn.Module) -> list[str]:
    return [patch.mode.name for patch in bs.patches(model)]


def massive_values(model: Any, family: str, batch: torch.Tensor) -> torch.Tensor:
    """Channel `CHANNEL` of the output of block `LAYER` at the first massive position, one value a
    row.
    """
    seen = []
    hook = models.blocks(model, family)[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(hidden_of(out))
    )
    output_of(model, batch)
    hook.remove()
    return seen[0][:, 1 if family == "timm" else 0, CHANNEL]


# -- what is applied


def test_a_patch_is_in_place_and_says_what_it_is(model, batch, sites):
    kind = type(model)
    keys = list(model.state_dict())
    before = output_of(model, batch)
    assert bs.patches(model) == ()
    assert bs.patch_model(model, "set_zero", sites=sites, layers="all") is model
    (patch,) = bs.patches(model)
    assert patch.mode == bs.SetZero()
    assert patch.layers == (1, 2, 3, 4)
    assert list(patch.sites) == list(sites)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict())  # strict
    assert not torch.equal(output_of(model, batch), before)
    assert bs.unpatch_model(model) is model


@pytest.mark.parametrize("layers", ["first", "all", [2]])
@pytest.mark.parametrize("mode", ["set_mean", "set_zero", "noise", "shuffle", "zero_random"])
def test_unpatching_leaves_no_trace(model, batch, sites, mode, layers):
    with untouched(model, batch):
        bs.patch_model(model, mode, sites=sites, layers=layers)
        output_of(model, batch)
        bs.unpatch_model(model)
    with untouched(model, batch), bs.patched(model, mode, sites=sites, layers=layers):
        output_of(model, batch)


def test_patching_changes_only_the_chosen_blocks(model, family, batch, sites):
    blocks = models.blocks(model, family)
    bs.patch_model(model, "set_zero", sites=sites, layers=[2, 4])
    assert [isinstance(block, EditedBlock) for block in blocks] == [False, False, True, False, True]
    assert len({type(block) for block in blocks}) == 2  # one subclass for the class, shared
    assert all(isinstance(block, host_class(blocks[0])) for block in blocks)
    assert host_class(blocks[2]) is type(blocks[0])


def test_unpatching_an_unpatched_model_is_no_error(model, batch):
    with untouched(model, batch):
        assert bs.unpatch_model(model) is model


# -- stacking


def test_patches_are_applied_in_the_order_in_which_they_came(model, family, batch, sites):
    mean = torch.tensor(sites.at(LAYER)[0].mean).item()
    with (
        bs.patched(model, "set_value", sites=sites, value=6000.0),
        bs.patched(model, "set_mean", sites=sites),
    ):
        nearest = min(
            sites.at(LAYER), key=lambda site: abs(site.mean - 6000.0)
        )  # of equal distances any
        assert names(model) == ["set_value", "set_mean"]
        assert (
            massive_values(model, family, batch).tolist() == [torch.tensor(nearest.mean).item()] * 3
        )
    with (
        bs.patched(model, "set_mean", sites=sites),
        bs.patched(model, "set_value", sites=sites, value=6000.0),
    ):
        assert names(model) == ["set_mean", "set_value"]
        assert massive_values(model, family, batch).tolist() == [6000.0] * 3
    with bs.patched(model, "set_mean", sites=sites):
        assert massive_values(model, family, batch).tolist() == [mean] * 3


def test_each_patch_can_be_removed_alone(model, family, batch, sites):
    with untouched(model, batch):
        bs.patch_model(model, "set_mean", sites=sites)
        mean = output_of(model, batch)
        bs.patch_model(model, "set_value", sites=sites, value=6000.0, layers="all")
        bs.patch_model(model, "set_value", sites=sites, value=9000.0, layers=[3])
        assert names(model) == ["set_mean", "set_value", "set_value"]
        bs.unpatch_model(model, bs.SetValue(9000.0))
        assert [patch.mode for patch in bs.patches(model)] == [bs.SetMean(), bs.SetValue(6000.0)]
        with pytest.raises(bs.NotPatched, match="set_zero"):
            bs.unpatch_model(model, "set_zero")
        with pytest.raises(bs.NotPatched, match=r"9000"):
            bs.unpatch_model(model, bs.SetValue(9000.0))
        bs.unpatch_model(model, "set_value")
        assert names(model) == ["set_mean"]
        assert torch.equal(output_of(model, batch), mean)
        bs.unpatch_model(model, bs.SetMean())


def test_one_name_removes_all_patches_of_that_mode(model, batch, sites):
    with untouched(model, batch):
        for layer in (1, 2):
            bs.patch_model(model, "set_zero", sites=sites, layers=[layer])
        assert names(model) == ["set_zero", "set_zero"]
        bs.unpatch_model(model, "set_zero")


def test_the_same_patch_twice_is_refused(model, batch, sites):
    bs.patch_model(model, "set_zero", sites=sites, layers=[2])
    with untouched(model, batch):
        for layers in ([2], "all", [1, 2]):
            with pytest.raises(bs.AlreadyPatched, match=r"set_zero.*layer 2.*unpatch_model"):
                bs.patch_model(model, "set_zero", sites=sites, layers=layers)
            with (
                pytest.raises(bs.AlreadyPatched),
                bs.patched(model, "set_zero", sites=sites, layers=layers),
            ):
                pass
    bs.patch_model(model, "set_zero", sites=sites, layers=[3])  # elsewhere it is another patch
    bs.patch_model(model, "noise", sites=sites, layers=[2], scale=0.5)
    bs.patch_model(model, "noise", sites=sites, layers=[2], scale=0.25)
    assert names(model) == ["set_zero", "set_zero", "noise", "noise"]  # in order of application


# -- the context manager


def test_nested_contexts_remove_their_own(model, batch, sites):
    bs.patch_model(model, "noise", sites=sites, scale=0.0, layers=[3])
    with untouched(model, batch):
        with bs.patched(model, "set_mean", sites=sites) as same:
            assert same is model
            with bs.patched(model, "set_zero", sites=sites):
                assert names(model) == ["noise", "set_mean", "set_zero"]
            assert names(model) == ["noise", "set_mean"]
        assert names(model) == ["noise"]


def test_a_context_ends_also_by_an_exception(model, batch, sites):
    with (
        untouched(model, batch),
        pytest.raises(KeyError),
        bs.patched(model, "set_zero", sites=sites),
    ):
        raise KeyError


def test_what_happens_inside_a_context_is_respected(model, batch, sites):
    with untouched(model, batch), bs.patched(model, "set_zero", sites=sites):
        bs.unpatch_model(model)
        assert names(model) == []
    with bs.patched(model, "set_zero", sites=sites):
        bs.patch_model(model, "set_mean", sites=sites)
    assert names(model) == ["set_mean"]


# -- a failure half-way


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failure_at_any_block_leaves_no_trace(model, batch, sites, monkeypatch, at, when, error):
    bs.patch_model(model, "noise", sites=sites, scale=0.0, layers=[2])
    attach = Edit.attach
    calls = []

    def fails(edit: Edit, block: nn.Module) -> None:
        calls.append(block)
        if when == "after" or len(calls) < at:
            attach(edit, block)
        if len(calls) == at:
            raise error("half-way")

    with untouched(model, batch):
        monkeypatch.setattr(Edit, "attach", fails)
        with pytest.raises(error, match="half-way"):
            bs.patch_model(model, "set_zero", sites=sites, layers="all")
        monkeypatch.undo()
        assert len(calls) == at
    bs.patch_model(model, "set_zero", sites=sites, layers="all")


def test_a_block_whose_class_cannot_be_changed_leaves_no_trace(model, batch, sites, monkeypatch):
    made = surgery.class_with
    classes = []

    def fails(host: type, wanted: list[type]) -> type:
        classes.append(host)
        if len(classes) == 2:
            raise TypeError("metaclass conflict")
        return made(host, wanted)

    with untouched(model, batch):
        monkeypatch.setattr(surgery, "class_with", fails)
        with pytest.raises(TypeError, match="metaclass"):
            bs.patch_model(model, "set_zero", sites=sites, layers="all")
        monkeypatch.undo()
    bs.patch_model(model, "set_zero", sites=sites, layers="all")


def test_a_failure_in_a_forward_leaves_the_patch(model, batch, sites):
    with untouched(model, batch):
        bs.patch_model(model, "set_zero", sites=sites)
        with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model raises)
            model(torch.zeros(1, 2, 3))
        assert names(model) == ["set_zero"]
        bs.unpatch_model(model)


# -- copies, files, siblings


def test_a_deep_copy_is_a_patched_model_of_its_own(model, batch, sites):
    before = output_of(model, batch)
    bs.patch_model(model, "set_zero", sites=sites, layers="all")
    after = output_of(model, batch)
    twin = copy.deepcopy(model)
    assert names(twin) == ["set_zero"]
    assert bs.patches(twin)[0] is not bs.patches(model)[0]
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), before)
    assert torch.equal(output_of(twin, batch), after)
    assert not torch.equal(before, after)
    bs.unpatch_model(twin)
    assert torch.equal(output_of(twin, batch), before)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_pickle_and_torch_save_keep_the_patch(model, batch, sites):
    before = output_of(model, batch)
    bs.patch_model(model, "set_mean", sites=sites)
    bs.patch_model(model, "set_zero", sites=sites, layers="all")
    after = output_of(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert bs.patches(again) == bs.patches(model)
        assert torch.equal(output_of(again, batch), after)
        bs.unpatch_model(again)
        assert torch.equal(output_of(again, batch), before)
        assert [type(m) for m in again.modules()] == [
            host_class(m) for m in model.modules() if not isinstance(m, BlockEdit)
        ]
    assert not torch.equal(before, after)


def test_another_process_loads_a_patched_model(tmp_path):
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    bs.patch_model(model, "set_zero", sites=bs.calibrate(model, ids))
    torch.save({"model": model, "ids": ids, "logits": output_of(model, ids)}, tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); saved = torch.load(sys.argv[1],"
        " weights_only=False)\nwith torch.no_grad(): logits ="
        " saved['model'](saved['ids']).logits\nassert torch.equal(logits, saved['logits'])\nimport"
        " biassurgery; biassurgery.unpatch_model(saved['model'])\nwith torch.no_grad(): logits ="
        " saved['model'](saved['ids']).logits\nassert not torch.equal(logits, saved['logits'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_state_dict_does_not_know_of_patches(model, family, batch, sites):
    before = output_of(model, batch)
    bs.patch_model(model, "set_zero", sites=sites, layers="all")
    fresh = build(family)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output_of(fresh, batch), before)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in fresh.named_parameters()
    ]


def test_two_models_of_one_config_do_not_leak(model, family, batch, sites):
    sibling = type(model)(model.config).eval() if family != "timm" else models.planted_vit()
    with untouched(sibling, batch):
        bs.patch_model(model, "set_zero", sites=sites, layers="all")
    assert names(sibling) == []
    with bs.patched(sibling, "zero_random", sites=sites), untouched(model, batch):
        pass


# -- models whose block cannot be changed


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
