"""Patched models that are copied, pickled, or opened in another process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import torch

import biassurgery as bs
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.swap import host_class
from tests import models
from tests.patching.patched_models import build, names
from tests.state import output_of, untouched


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
