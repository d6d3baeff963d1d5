"""A patched model is still the object that it was: unpatched, copied, stored, not shared."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible, LayerOutOfRange, NotPatched
from biassurgery.surgery import edit as surgery
from tests.contract.cases import (
    CHANNELS,
    PARAMETERS,
    POSITIONS,
    Case,
    activation_cases,
    every_case,
    object_cases,
    typical_cases,
)
from tests.contract.running import see, substitute
from tests.models import LAYER, LAYERS
from tests.state import bits, fingerprint, output_of, untouched


@every_case
def test_unpatch(case: Case) -> None:
    model = case.model()
    batch = case.batch()
    for mode in (None, case.mode):
        with untouched(model, batch):
            case.patch(model, layers=case.several)
            output_of(model, batch)
            assert [p.mode.name for p in bs.patches(model)] == [case.mode]
            bs.unpatch_model(model, mode)
            assert bs.patches(model) == ()


def added_names(case: Case) -> set[str]:
    """The ends of the names that a patch adds to the state dict.

    Nothing on activations, its parameters and offsets on attention.
    """
    kind = case.variant.removeprefix("attention_bias ")
    if case.mode == "transplant":
        return {"transplant.k_bias", "transplant.v_bias", "transplant.logit"}
    offset = ("logit",) if kind in ("kv", "k", "off_by_one") else ()
    if case.mode != "attention_bias":
        return set()
    return {f"attention_bias_{kind}.{name}" for name in PARAMETERS.get(kind, ()) + offset}


@every_case
def test_state_dict(case: Case) -> None:
    """Only the keys of the mode come, to every attention; nothing else changes.

    A checkpoint loads into a patched model.
    """
    model = case.model()
    before = [(name, bits(tensor)) for name, tensor in model.state_dict().items()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    names = dict(before)
    case.patch(model)
    output_of(model, case.batch())
    state = model.state_dict()
    assert [(name, bits(tensor)) for name, tensor in state.items() if name in names] == before
    assert [(name, id(p)) for name, p in model.named_parameters() if name in names] == parameters
    added = [".".join(name.split(".")[-2:]) for name in state if name not in names]
    assert sorted(added) == sorted([*added_names(case)] * LAYERS)
    assert {name for name, _ in model.named_parameters()} - set(names) == {
        name for name in state if name not in names and not name.endswith(".logit")
    }
    twin = case.patched()
    twin.load_state_dict(
        {name: tensor + 1 if name not in names else tensor for name, tensor in state.items()},
        strict=True,
    )
    assert not added or not torch.equal(
        output_of(twin, case.batch()), output_of(model, case.batch())
    )
    twin.load_state_dict(state, strict=True)
    assert torch.equal(output_of(twin, case.batch()), output_of(model, case.batch()))
    assert isinstance(case.changed(model), type(case.changed(case.model())))


def assert_independent_twin(case: Case, model: Any, twin: Any) -> None:
    """The twin of a patched model computes the same, and each can be unpatched by itself."""
    batch = case.batch()
    plain = case.model()
    patched = output_of(model, batch)
    assert torch.equal(output_of(twin, batch), patched)
    assert [(p.mode, p.layers, p.sites) for p in bs.patches(twin)] == [
        (p.mode, p.layers, p.sites) for p in bs.patches(model)
    ]
    bs.unpatch_model(twin)
    assert torch.equal(output_of(twin, batch), output_of(plain, batch))
    assert type(case.changed(twin)) is type(case.changed(plain))
    assert torch.equal(output_of(model, batch), patched)
    case.patch(twin)
    bs.unpatch_model(model)
    assert torch.equal(output_of(twin, batch), patched)
    assert torch.equal(output_of(model, batch), output_of(plain, batch))
    assert case.mode == "instrument" or not torch.equal(patched, output_of(plain, batch))


@object_cases
def test_deepcopy(case: Case) -> None:
    model = case.patched()
    assert_independent_twin(case, model, copy.deepcopy(model))


@object_cases
def test_pickle(case: Case) -> None:
    model = case.patched()
    assert_independent_twin(case, model, pickle.loads(pickle.dumps(model)))


@object_cases
def test_torch_save(case: Case) -> None:
    model = case.patched()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_independent_twin(case, model, torch.load(file, weights_only=False))


def test_a_saved_model_opens_in_another_process(tmp_path: Path) -> None:
    """The class of a patched block is made at run time; the file says how."""
    case = Case("llama", "set_zero")
    model = case.patched()
    file = tmp_path / "model.pt"
    result = tmp_path / "logits.pt"
    torch.save((model, case.batch()), file)
    program = (
        "import sys, torch; model, batch = torch.load(sys.argv[1], weights_only=False);"
        "torch.set_num_threads(1); torch.save(model(batch).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, file, result], check=True)
    assert torch.equal(torch.load(result), output_of(model, case.batch()))


@typical_cases
def test_save_patch(case: Case, tmp_path: Path) -> None:
    """The weights in the library's own format and the patch in ours give the patched model back."""
    model = case.patched()
    case.save_weights(model, tmp_path)
    bs.save_patch(model, tmp_path / "patch")
    assert_independent_twin(
        case, model, bs.load_patch(case.load_weights(tmp_path), tmp_path / "patch")
    )


@object_cases
def test_siblings(case: Case) -> None:
    """Another model of the same classes, and of the same config object, is not touched."""
    model = case.model()
    batch = case.batch()
    sibling = type(model)(model.config).eval() if case.modality == "text" else case.model()
    with untouched(sibling, batch):
        case.patch(model)
        output_of(model, batch)
    assert type(case.changed(sibling)) is not type(case.changed(model))


def beforehand(case: Case, model: Any) -> None:
    """Another patch, which has nothing to do with the mode."""
    bs.patch_model(
        model, "zero_random", seed=5, sites=Case(case.family, "set_zero").sites(), layers=LAYER
    )


class Interrupted(BaseException):
    """Neither ours nor an Exception: what Ctrl-C is like."""


@object_cases
@pytest.mark.parametrize("step", ["attach", "class_with", "set_class"])
@pytest.mark.parametrize("already", [False, True], ids=["", "on_top"])
def test_failure_half_way(
    case: Case, step: str, already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the second of two blocks leaves no trace.

    In neither, nor in what was applied before.
    """
    model = case.model()
    batch = case.batch()
    calls = []
    if already:
        beforehand(case, model)
    target: Any = surgery.Edit if step == "attach" else surgery
    original = getattr(target, step)

    def failing(*arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == 2:
            raise Interrupted
        return original(*arguments)

    with untouched(model, batch), monkeypatch.context() as patching:
        patching.setattr(target, step, failing)
        with pytest.raises(Interrupted):
            case.patch(model, layers=case.several)
    case.patch(model)
    assert case.mode in {p.mode.name for p in bs.patches(model)}


@object_cases
def test_refusals(case: Case) -> None:
    """What cannot be applied is refused before anything is changed."""
    model = case.patched()
    batch = case.batch()
    with untouched(model, batch):
        with pytest.raises(bs.AlreadyPatched):
            case.patch(model)
        with pytest.raises(LayerOutOfRange):
            case.patch(model, layers=99)
        with pytest.raises(NotPatched):
            bs.unpatch_model(model, "noise" if case.mode != "noise" else "set_zero")
        if not (case.on_values or case.on_roles):
            with pytest.raises(BadOption, match="sites"):
                case.patch(model, sites=Case(case.family, "set_zero").sites())
        elif not case.positional:
            foreign = bs.Sites(case.sites(), origin=bs.Origin(architecture="another"))
            with pytest.raises(Incompatible):
                case.patch(model, sites=foreign)


@activation_cases
def test_stack(case: Case) -> None:
    """Patches work in the order in which they were applied, and come off in any order."""
    model = case.model()
    batch = case.batch()
    plain = case.model()
    written = 77.0
    channel = 20

    def over(target: Any) -> Any:
        return bs.patch_model(
            target,
            "set_value",
            value=written,
            channels=(channel, *CHANNELS),
            positions=POSITIONS[0],
            layers=LAYER,
        )

    first = case.patched()
    second = over(case.model())
    both = see(case, over(case.patch(model)), batch)
    expected = see(case, first, batch).hidden.clone()
    expected[:, POSITIONS[0], [channel, *CHANNELS]] = written  # the later patch has the last word
    assert torch.equal(both.hidden, expected)
    substitute(case, plain, lambda _: expected)
    assert torch.equal(both.logits, output_of(plain, batch))
    mine, others = bs.patches(model)
    bs.unpatch_model(model, others.mode)
    assert torch.equal(output_of(model, batch), output_of(first, batch))
    over(model)
    bs.unpatch_model(model, mine.mode)
    assert torch.equal(output_of(model, batch), output_of(second, batch))
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, batch), output_of(case.model(), batch))


@object_cases
def test_context_manager(case: Case) -> None:
    """`patched` takes its own patch off again, also when the block raises, and leaves others."""
    model = case.model()
    batch = case.batch()
    beforehand(case, model)
    before = fingerprint(model)
    output = output_of(model, batch)
    options = {"value": -50.0} if case.mode == "set_value" else {}
    if case.positional:
        options |= {"channels": 9, "positions": 2}

    def use() -> None:
        with bs.patched(model, case.mode, **case.arguments(**options)):
            assert case.mode == "instrument" or not torch.equal(output_of(model, batch), output)
            raise Interrupted

    with pytest.raises(Interrupted):
        use()
    assert fingerprint(model) == before
