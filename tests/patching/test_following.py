"""What is on a model follows it: training flags, what trains, dtypes, devices, emptied modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import Edit, edits_in
from tests.models import planted, tokens
from tests.patching.subjects import NAMES, Subject, dtypes_of, subject
from tests.state import untouched

# of each way of changing a model one, none of which draws random numbers as it runs
TYPICAL = {
    "set_mean": ("set_mean", {}),
    "positions": ("set_value", {"positions": (0, 2)}),
    "kv": ("attention_bias", {"kind": "kv", "trainable": "all"}),
    "gate": ("attention_bias", {"kind": "gate", "trainable": "all"}),
    "transplant": ("transplant", {}),
    "registers": ("fix_registers", {"fill": "mean"}),
    "token": ("test_time_registers", {}),
}


def arguments(kind: Subject, variant: str) -> dict[str, Any]:
    """Those of `patch_model` for a subject's last tower."""
    mode, options = TYPICAL[variant]
    found = [
        each
        for each in kind.patchings
        if each.mode == mode
        and all(each.options.get(name) == value for name, value in options.items())
        and each.options.get("init") is None
    ]
    return found[-1].arguments([1] if variant == "positions" else "all")


CASES = [
    pytest.param(name, variant, id=f"{name}-{variant}")
    for name in NAMES
    for variant in TYPICAL
    if (variant != "transplant" or name in ("llama", "gpt2"))
    and (variant not in ("registers", "token") or name in ("timm", "dinov2"))
]
every_case = pytest.mark.parametrize(("name", "variant"), CASES)


def patched(name: str, variant: str) -> tuple[Subject, Any]:
    kind = subject(name)
    model = kind.build()
    return kind, bs.patch_model(model, **arguments(kind, variant))


@every_case
def test_the_training_flag(name: str, variant: str) -> None:
    kind = subject(name)
    for training in (True, False):
        model = kind.build().train(training)
        bs.patch_model(model, **arguments(kind, variant))
        assert {module.training for module in model.modules()} == {training}
        model.train(not training)
        assert {edit.training for _, edit in edits_in(model)} == {not training}
        bs.unpatch_model(model)
        assert {module.training for module in model.modules()} == {not training}


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_patched_model_that_is_cast_is_a_cast_model_that_is_patched(
    name: str, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype not in dtypes_of(name):
        pytest.skip(f"{name} of this version of its library does not run in {dtype} unpatched")
    kind, model = patched(name, variant)
    bs.save_patch(model, tmp_path)
    cast_first = bs.load_patch(kind.build().to(dtype), tmp_path)
    before = kind.output(model)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = kind.output(model)
    assert output.dtype == dtype
    assert torch.equal(output, kind.output(cast_first))
    assert not torch.equal(output, kind.output(kind.build().to(dtype)))
    bs.unpatch_model(model.to(torch.float32))
    assert torch.equal(kind.output(model), kind.output(kind.build()))
    if dtype == torch.float64:
        torch.testing.assert_close(output.float(), before, rtol=1e-3, atol=1e-3)


def emptied_and_loaded(model: nn.Module, assign: bool) -> None:
    """To the meta device and back; buffers that no file has are put back by hand."""
    saved = copy.deepcopy(model.state_dict())
    others = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name not in saved and not isinstance(model.get_submodule(parent(name)), Edit)
    }
    model.to("meta")
    if not assign:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, torch.nan)
    model.load_state_dict(saved, assign=assign)
    for name, buffer in others.items():
        setattr(model.get_submodule(parent(name)), name.rpartition(".")[2], buffer)


def parent(name: str) -> str:
    return name.rpartition(".")[0]


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_a_patched_model_that_is_emptied_and_loaded(name: str, variant: str, assign: bool) -> None:
    kind, model = patched(name, variant)
    wanted = kind.output(model)
    emptied_and_loaded(model, assign)
    assert torch.equal(kind.output(model), wanted)
    bs.unpatch_model(model)
    assert torch.equal(kind.output(model), kind.output(kind.build()))


def test_slopes_of_alibi_outlive_an_emptied_model() -> None:
    model = planted("mpt")
    ids = tokens(rows=2, length=12)
    bs.patch_model(model, "transplant", key_values=bs.calibrate_key_values(model, ids))

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids[:, 1:]).logits

    wanted = logits()
    emptied_and_loaded(model, assign=False)
    assert torch.equal(logits(), wanted)


# -- what trains


def test_parameters_of_a_frozen_model_stay_frozen() -> None:
    for trainable in ("all", "bias"):
        model = planted("llama").requires_grad_(False)
        with untouched(model):
            bs.patch_model(model, "attention_bias", kind="kv", trainable=trainable)
            trains = {name for name, p in model.named_parameters() if p.requires_grad}
            assert trains == {
                name for name, _ in model.named_parameters() if "attention_bias" in name
            }
            assert len(trains) == 10
            bs.unpatch_model(model)


@pytest.fixture
def trained() -> Any:
    """A model of which only the biases train, and whose first block was frozen before."""
    model = planted("llama")
    model.model.layers[0].requires_grad_(False)
    return bs.patch_model(model, "attention_bias", kind="kv", init="normal", trainable="bias")


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def but(model: nn.Module, *prefixes: str) -> set[str]:
    """The names of all parameters but those that begin so."""
    return {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}


def test_what_was_frozen_stays_so_and_the_rest_trains_again(trained: Any) -> None:
    assert all("attention_bias" in name for name in training(trained))
    bs.unpatch_model(trained)
    assert training(trained) == but(trained, "model.layers.0.")


@pytest.mark.parametrize(
    ("path", "frozen"),
    [
        ("", ""),
        ("model", ""),  # all biases are in it, so that it looks the same
        ("model.layers.2", "model.layers.2."),
        ("model.layers.2.self_attn", "model.layers.2."),
    ],
)
def test_what_users_freeze_meanwhile_stays_frozen(trained: Any, path: str, frozen: str) -> None:
    """Where the biases were frozen with it, as by `requires_grad_` of a module that holds some."""
    trained.get_submodule(path).requires_grad_(False)
    bs.unpatch_model(trained)
    assert training(trained) == but(trained, "model.layers.0.", frozen)


def test_what_users_let_train_meanwhile_trains(trained: Any) -> None:
    trained.model.layers[0].requires_grad_(True)
    bs.unpatch_model(trained)
    assert training(trained) == but(trained, "nothing")


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_loaded_meanwhile_trains_again(trained: Any, copied: bool) -> None:
    """Loading by assignment puts new parameters in the places of those that were frozen."""
    host = planted("llama")
    if copied:
        trained = copy.deepcopy(trained)
    before = dict(trained.named_parameters())
    missing, unexpected = trained.load_state_dict(host.state_dict(), strict=False, assign=True)
    assert not unexpected
    assert all("attention_bias" in name for name in missing)
    assert trained.lm_head.weight is not before["lm_head.weight"]
    assert all("attention_bias" in name for name in training(trained))
    bs.unpatch_model(trained)
    assert training(trained) == but(trained, "model.layers.0.")


# -- models without values


def on_meta(kind: Subject) -> Any:
    return kind.build().to("meta")


def under_accelerate(kind: Subject) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights():
        return type(kind.build())(kind.build().config).eval()


VERBS: dict[str, Callable[[Any, Tensor, Path], Any]] = {
    "set_mean": lambda model, batch, _: bs.patch_model(model, "set_mean"),
    "bias": lambda model, batch, _: bs.patch_model(model, "attention_bias"),
    "load_patch": lambda model, batch, folder: bs.load_patch(model, folder),
    "calibrate": lambda model, batch, _: bs.calibrate(model, batch),
    "detect": lambda model, batch, _: bs.detect(model, batch),
    "key_values": lambda model, batch, _: bs.calibrate_key_values(model, batch),
    "perplexity": lambda model, batch, _: bs.perplexity(model, batch),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [on_meta, under_accelerate])
def test_a_model_without_values_is_refused_until_it_is_loaded(
    make: Callable[[Subject], Any], verb: str, tmp_path: Path
) -> None:
    kind = subject("gpt2")
    full = kind.build()
    with bs.patched(full, "attention_bias", kind="k"):
        bs.save_patch(full, tmp_path)
    model = make(kind)
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match=r"on the meta device and holds no values; load"),
    ):
        VERBS[verb](model, kind.reading[None], tmp_path)
    model.load_state_dict(full.state_dict(), assign=True)
    model.tie_weights()
    with bs.patched(model, "attention_bias", kind="kv", std=1.0):
        assert kind.output(model).isfinite().all()
    assert torch.equal(kind.output(model), kind.output(full))


@pytest.mark.parametrize("name", NAMES)
def test_new_parameters_without_values_are_refused(name: str) -> None:
    from accelerate import init_empty_weights

    model = subject(name).build()
    with (
        untouched(model),
        init_empty_weights(),
        pytest.raises(UnsupportedModel, match=r"init_empty_weights\(\); leave that block"),
    ):
        bs.patch_model(model, "attention_bias", kind="kv")
