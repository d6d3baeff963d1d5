"""Tokens alone in a sequence: as if each were a forward of its own, up to one block."""

from __future__ import annotations

import pytest
import torch

from biassurgery.errors import BadOption, LayerOutOfRange
from biassurgery.measure.alone import values_alone
from tests.models import CHANNEL, DELIMITER_ID, LAYER, START, START_ID, VOCAB, planted
from tests.state import fingerprint, output_of


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_value_is_that_of_a_forward_of_its_own(family: str) -> None:
    model = planted(family)
    before = fingerprint(model)
    ids = torch.tensor([START_ID, 7, DELIMITER_ID, 30, 30])
    found = values_alone(model, ids, LAYER, CHANNEL, batch_size=2)
    assert fingerprint(model) == before
    with torch.no_grad():
        wanted = [
            model(token.view(1, 1), output_hidden_states=True).hidden_states[LAYER + 1][
                0, 0, CHANNEL
            ]
            for token in ids
        ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-4)
    assert found[0].abs() > START / 2
    assert found[1].abs() < 100


def test_what_comes_behind_the_block_does_not_run() -> None:
    model = planted("llama")
    wanted = values_alone(model, torch.arange(VOCAB), LAYER, CHANNEL)

    def refuse(*_: object) -> None:
        raise AssertionError("it ran")

    handles = [
        module.register_forward_hook(refuse)
        for module in (model.model.layers[LAYER + 1], model.lm_head)
    ]
    assert torch.equal(values_alone(model, torch.arange(VOCAB), LAYER, CHANNEL), wanted)
    for handle in handles:
        handle.remove()
    assert output_of(model, torch.arange(4)[None]).isfinite().all()


def test_refusals() -> None:
    model = planted("llama")
    with pytest.raises(BadOption, match="channel: 64; give one from 0 to 63"):
        values_alone(model, torch.arange(3), LAYER, 64)
    with pytest.raises(LayerOutOfRange):
        values_alone(model, torch.arange(3), 5, CHANNEL)
