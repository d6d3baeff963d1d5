"""A fault at any call inside the library leaves a model as it was, or patched as a whole.

Where it is left patched (the fault came before anything was taken off), one `unpatch_model` gives
the model back, bit by bit. `pytest --all-faults` tries every call, otherwise a sample is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import biassurgery as bs
from tests import models
from tests.state import bits, fingerprint, output_of
from tests.surgery.faults import Broken, Interrupted, count_calls, fault, fault_at_line

SAMPLE = 40  # calls of each action that are tried where not all are


class Subject(NamedTuple):
    """A model, what it reads, and findings of it."""

    model: Any
    ids: torch.Tensor
    sites: Any
    key_values: Any


def nothing(subject: Subject, folder: str) -> None:
    """What is done before an action that needs nothing."""


class Action(NamedTuple):
    """Something that is done to a model, what was done before, and which whole patch a fault may
    leave besides what there is before or after it.
    """

    do: Callable[[Subject, str], Any]
    before: Callable[[Subject, str], Any] = nothing
    whole: Callable[[Subject, str], Any] = nothing


def patch(mode: str, **options: Any) -> Callable[[Subject, str], Any]:
    def do(subject: Subject, folder: str) -> None:
        given = {
            name: getattr(subject, name) if value is ... else value
            for name, value in options.items()
        }
        bs.patch_model(subject.model, mode, **given)

    return do


set_zero = patch("set_zero", sites=..., layers="all")
bias = patch("attention_bias", kind="kv", init="normal", trainable="bias")
transplant = patch("transplant", key_values=...)


def unpatch(subject: Subject, folder: str) -> None:
    bs.unpatch_model(subject.model)


def both(subject: Subject, folder: str) -> None:
    set_zero(subject, folder)
    bias(subject, folder)


def save(subject: Subject, folder: str) -> None:
    both(subject, folder)
    bs.save_patch(subject.model, folder)
    unpatch(subject, folder)


def context(subject: Subject, folder: str) -> None:
    with bs.patched(subject.model, "set_zero", sites=subject.sites):
        output_of(subject.model, subject.ids)


def record(subject: Subject, folder: str) -> None:
    what = ("sink_mass", "block_output", "attention_output", "q")
    with bs.record(subject.model, what):
        output_of(subject.model, subject.ids)


ACTIONS = {
    "patch_model set_zero": Action(set_zero),
    "patch_model attention_bias": Action(bias),
    "patch_model transplant": Action(transplant),
    "patch_model on a patched one": Action(bias, set_zero),
    "unpatch_model set_zero": Action(unpatch, set_zero),
    "unpatch_model attention_bias": Action(unpatch, bias),
    "unpatch_model transplant": Action(unpatch, transplant),
    "unpatch_model both": Action(unpatch, both),
    "load_patch": Action(lambda subject, folder: bs.load_patch(subject.model, folder), save),
    "patched": Action(context, whole=patch("set_zero", sites=...)),
    "record": Action(record),
    "record a patched one": Action(record, both),
    "calibrate": Action(lambda subject, folder: bs.calibrate(subject.model, subject.ids)),
    "calibrate a patched one": Action(
        lambda subject, folder: bs.calibrate(subject.model, subject.ids), both
    ),
    "detect": Action(lambda subject, folder: bs.detect(subject.model, subject.ids)),
    "calibrate_key_values": Action(
        lambda subject, folder: bs.calibrate_key_values(subject.model, subject.ids)
    ),
}


@pytest.fixture
def subject() -> Subject:
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    return Subject(model, ids, bs.calibrate(model, ids), bs.calibrate_key_values(model, ids))


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model is, but for how often its tensors were written and whose they are: a patch
    that was loaded again has tensors of its own.
    """
    return {
        name: (value[1], value[3]) if isinstance(value, tuple) else value
        for name, value in fingerprint(model).items()
    }


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("error", [Broken, pytest.param(Interrupted, marks=pytest.mark.long)])
def test_a_fault_at_any_call(
    subject: Subject, name: str, error: type[BaseException], tmp_path: Any, request: Any
) -> None:
    action = ACTIONS[name]
    folder = str(tmp_path)
    plain = state(subject.model)
    untouched_output = bits(output_of(subject.model, subject.ids))

    def begin() -> None:
        bs.unpatch_model(subject.model)
        torch.manual_seed(0)
        action.before(subject, folder)

    begin()
    action.do(subject, folder)  # what is made once and kept (classes, adapters) is made here
    begin()
    before = state(subject.model)
    output_before = bits(output_of(subject.model, subject.ids))
    torch.manual_seed(1)
    calls = count_calls(lambda: action.do(subject, folder))
    after = state(subject.model)
    output_after = bits(output_of(subject.model, subject.ids))
    begin()
    action.whole(subject, folder)
    between = state(subject.model)
    output_between = bits(output_of(subject.model, subject.ids))
    outputs = [(before, output_before), (after, output_after), (between, output_between)]
    begin()
    step = 1 if request.config.getoption("all_faults") else max(1, calls // SAMPLE)
    first = 1 + len(name) % step
    for at in range(first, calls + 1, step):
        torch.manual_seed(1)
        with fault(at, error), pytest.raises(error) as raised:
            action.do(subject, folder)
        found = state(subject.model)
        where = f"{name}, {raised.value}"
        expected = [output for known, output in outputs if found == known]
        assert expected, where
        assert bits(output_of(subject.model, subject.ids)) == expected[0], where
        if found != before or at + step > calls:
            bs.unpatch_model(subject.model)
            assert state(subject.model) == plain, where
            assert bits(output_of(subject.model, subject.ids)) == untouched_output, where
            begin()
    bs.unpatch_model(subject.model)


@pytest.mark.parametrize("name", ["record", pytest.param("calibrate", marks=pytest.mark.long)])
def test_an_interruption_at_any_line_where_observers_go_on_and_off(
    subject: Subject, name: str, tmp_path: Any
) -> None:
    """Nothing but the block itself would take them off again, for they belong to no patch."""
    subject.model.train()
    before = state(subject.model)
    lines = {"attached", "attach_all", "detach_all", "reading", "attach", "detach"}
    at = 0
    while True:
        at += 1
        # What torch is set to is not looked at: line events come also where no signal can.
        with (
            torch.set_grad_enabled(True),
            torch.compiler.set_stance("default"),
            suppress(Interrupted),
            fault_at_line(at, Interrupted, lines) as count,
        ):
            ACTIONS[name].do(subject, str(tmp_path))
        assert state(subject.model) == before, at
        if count[0] < at:
            break
    assert at > 50
