"""How a model is read: what holds meanwhile, and what is as it was afterwards."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.measure.reading import reading, with_bar
from tests.models import images, planted, planted_vit, tokens
from tests.surgery.faults import Broken, Interrupted, count_calls, fault


def half_training() -> torch.nn.Module:
    """A model in which some modules are in training mode, as when a part is frozen."""
    model = planted("llama").train()
    model.model.layers[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("eager", [True, False])
def test_what_holds_meanwhile(eager):
    model = half_training()
    before = modes(model)
    compiled = torch.compile(torch.nn.Linear(3, 3), backend=backend)
    ran.clear()
    with reading(model, eager=eager):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
        compiled(torch.ones(3))
    assert bool(ran) is not eager  # compiled code is left out, or not
    assert modes(model) == before
    assert any(before)
    assert torch.is_grad_enabled()


ran: list[object] = []


def backend(graph, inputs):
    ran.append(graph)
    return graph.forward


@pytest.mark.parametrize("error", [Broken, pytest.param(Interrupted, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", ["calibrate", "detect", "registers"])
def test_a_fault_at_any_call_leaves_every_mode_and_gradients(verb, error):
    if verb == "registers":
        model, batch = planted_vit(reg_tokens=2).train(), images(1)
        model.blocks[1].eval()
    else:
        model, batch = half_training(), tokens(rows=1, length=12)
    verbs = {"calibrate": bs.calibrate, "detect": bs.detect, "registers": bs.calibrate_registers}
    before = modes(model)
    classes = [type(module) for module in model.modules()]

    def act():
        verbs[verb](model, batch)

    act()
    calls = count_calls(act)
    for at in range(1, calls + 1, max(1, calls // 150)):
        with fault(at, error), pytest.raises(error):
            act()
        assert modes(model) == before, at
        assert [type(module) for module in model.modules()] == classes, at
        assert torch.is_grad_enabled()


def test_the_bar_counts_and_is_shown_on_request(capsys):
    assert list(with_bar([1, 2], "reading", True)) == [1, 2]
    assert "reading: 100%" in capsys.readouterr().err
    assert list(with_bar(iter([1, 2]), "reading", None)) == [1, 2]  # not a terminal
    assert list(with_bar([1, 2], "reading", False)) == [1, 2]
    assert capsys.readouterr().err == ""
