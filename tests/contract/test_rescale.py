"""`rescale`: the same function with smaller hidden states, by weights alone, and back bitwise."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.surgery.rescale import CONFIG_KEY
from tests import models, vision
from tests.contract.cases import CASES, FACTOR, Case, parametrize
from tests.contract.running import distance, hidden_of
from tests.state import fingerprint, output_of, untouched

every_family = pytest.mark.parametrize(
    "case", [pytest.param(case) for case in CASES if case.on_weights], ids=str
)
# What does not depend on how a family is built.
anywhere = parametrize([case for case in CASES if case.on_weights])
# What a model returns may be a hidden state itself, as of CLIP's image tower without its head.
RETURNS_HIDDEN = ("clip_vision",)
pytestmark = pytest.mark.filterwarnings("ignore:rescale. of a saved checkpoint")


def hidden(case: Case, model: Any) -> list[Tensor]:
    """What each block returns, by plain hooks."""
    blocks = (vision.blocks if case.modality == "image" else models.blocks)(model, case.family)
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, o: seen.append(hidden_of(o))) for b in blocks]
    output_of(model, case.batch())
    for hook in hooks:
        hook.remove()
    return seen


@every_family
def test_same_function(case: Case) -> None:
    """The output is what it was, and every hidden state the factor times what it was."""
    model = case.model()
    batch = case.batch()
    before, was = output_of(model, batch), hidden(case, model)
    assert [type(module) for module in model.modules()][1:] == [
        type(module) for module in case.patch(model).modules() if module.__module__[:5] != "biass"
    ][1:]  # no code in any block
    for old, new in zip(was, hidden(case, model)):
        torch.testing.assert_close(new, old * FACTOR, rtol=1e-5, atol=1e-6)
    after = output_of(model, batch)
    if case.family in RETURNS_HIDDEN and distance(after, before) > 1e-5:
        before = before * FACTOR
    assert distance(after, before) <= 1e-5


@every_family
def test_unpatch(case: Case) -> None:
    model = case.model()
    batch = case.batch()
    for mode in (None, "rescale"):
        with untouched(model, batch):
            case.patch(model)
            assert [patch.mode.factor for patch in bs.patches(model)] == [FACTOR]
            bs.unpatch_model(model, mode)
            assert bs.patches(model) == ()
    with untouched(model, batch), bs.patched(model, "rescale", **case.arguments()):
        assert fingerprint(model)["state_dict"] != fingerprint(case.model())["state_dict"]


@anywhere
def test_copies(case: Case) -> None:
    """A copy and what comes out of a pickle are unpatched by themselves."""
    model = case.patched()
    batch = case.batch()
    patched = output_of(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(twin, batch), patched)
        bs.unpatch_model(twin)
        assert fingerprint_of_weights(twin) == fingerprint_of_weights(case.model())
    assert torch.equal(output_of(model, batch), patched)


def fingerprint_of_weights(model: Any) -> Any:
    return fingerprint(model)["state_dict"]


@every_family
def test_save_patch(case: Case, tmp_path: Path) -> None:
    """A saved patch is put on the original model, or taken up by a checkpoint that has it."""
    model = case.patched()
    batch = case.batch()
    case.save_weights(model, tmp_path)
    bs.save_patch(model, tmp_path / "patch")
    for twin in (case.model(), case.load_weights(tmp_path)):
        bs.load_patch(twin, tmp_path / "patch")
        assert fingerprint_of_weights(twin) == fingerprint_of_weights(model)
        assert torch.equal(output_of(twin, batch), output_of(model, batch))
        bs.unpatch_model(twin)
        assert fingerprint_of_weights(twin) == fingerprint_of_weights(case.model())
        assert torch.equal(output_of(twin, batch), output_of(case.model(), batch))


@every_family
def test_config(case: Case, tmp_path: Path) -> None:
    """The factor stands in the config of this model alone; a checkpoint with it is not rescaled."""
    model = case.model()
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        assert not hasattr(case.patched(), CONFIG_KEY)
        return
    sibling = type(model)(config)
    before = copy.deepcopy(config)
    case.patch(model)
    bs.unpatch_model(model)
    assert model.config is config
    case.patch(model)
    assert getattr(model.config, CONFIG_KEY) == FACTOR
    assert sibling.config == before
    assert config == before
    model.save_pretrained(tmp_path)
    stock = type(case.model()).from_pretrained(tmp_path).eval()
    assert getattr(stock.config, CONFIG_KEY) == FACTOR
    with untouched(stock, case.batch()), pytest.raises(bs.AlreadyPatched):
        case.patch(stock)
    bs.unpatch_model(model)
    assert not hasattr(model.config, CONFIG_KEY)


@anywhere
def test_twice(case: Case) -> None:
    model = case.patched()
    with untouched(model, case.batch()):
        with pytest.raises(bs.AlreadyPatched):
            case.patch(model)
        with pytest.raises(bs.AlreadyPatched):
            case.patch(model, factor=0.5)


@anywhere
def test_bfloat16(case: Case) -> None:
    """A power of two changes no digit: bfloat16 models say the same, bit for bit."""
    model = case.model(torch.bfloat16)
    batch = case.batch() if case.modality == "text" else case.batch().bfloat16()
    before = output_of(model, batch)
    with untouched(model, batch):
        case.patch(model, **({} if case.modality == "text" else {"batches": batch}))
        after = output_of(model, batch)
        assert min(distance(after, before), distance(after / FACTOR, before)) < 1e-2
        bs.unpatch_model(model)
