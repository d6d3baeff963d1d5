"""Test-time registers together with recording and with other patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.surgery.block import added_tokens
from tests.edits.plain_hooks import neurons_of, random_vit
from tests.models import (
    CHANNEL,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYER,
    LAYERS,
    PATCH,
    START_ID,
    images,
    planted_vit,
)
from tests.state import output_of, untouched


@pytest.mark.parametrize(
    ("options", "position"),
    [({}, 1), ({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)],
    ids=str,
)
def test_record_sees_the_token_in_every_block_behind_the_prefix(options, position):
    model = random_vit(**options)
    batch = images(3).double()
    tokens = position + 1 + (IMAGE // PATCH) ** 2
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))
    output = output_of(model, batch)
    with bs.record(model, ("block_input", "block_output", "probs")) as rec:
        assert torch.equal(output_of(model, batch), output)
    for layer in range(LAYERS):
        assert (
            rec["block_input"][layer].shape
            == rec["block_output"][layer].shape
            == (3, tokens, HIDDEN)
        )
        assert rec["probs"][layer].shape == (3, HEADS, tokens, tokens)
    assert (~rec["block_input"][0].any(-1)).nonzero().tolist() == [
        [row, position] for row in range(3)
    ]
    assert torch.equal(rec["block_input"][1], rec["block_output"][0])
    assert added_tokens(model.blocks[0]) == 1


OTHERS: dict[str, dict[str, Any]] = {
    "set_zero": {},
    "instrument": {},
    "attention_bias": {"kind": "sink_logit"},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_beside_another_patch(other, first):
    model = planted_vit(torch.float64)
    batch = images(3).double()
    neurons = {LAYER: [START_ID]}
    options: dict[str, Any] = OTHERS[other]
    sites = bs.Sites([bs.Site(LAYER, CHANNEL, "patch", 3000.0, gate=500.0)])

    def on(name: str) -> None:
        torch.manual_seed(5)
        given = {"sites": sites} if name == "set_zero" else options
        bs.patch_model(
            model,
            name,
            **({"neurons": neurons_of(model, neurons)} if name == "test_time_registers" else given),
        )

    names = ["test_time_registers", other] if first else [other, "test_time_registers"]
    with untouched(model, batch):
        alone = {}
        for name in names:
            on(name)
            alone[name] = output_of(model, batch)
            bs.unpatch_model(model)
        for name in names:
            on(name)
        both = output_of(model, batch)
        if other == "instrument":
            torch.testing.assert_close(both, alone["test_time_registers"], rtol=0, atol=1e-9)
        else:
            assert min((both - output).abs().max() for output in alone.values()) > 1e-6
        bs.unpatch_model(model, names[0])
        assert torch.equal(output_of(model, batch), alone[names[1]])
        bs.unpatch_model(model, names[1])


def test_the_massive_activation_is_fixed_where_it_has_gone():
    model = planted_vit()
    batch = images(3)
    bs.patch_model(model, "test_time_registers", neurons=neurons_of(model, {LAYER: [START_ID]}))
    bs.patch_model(
        model,
        "set_value",
        value=0.0,
        sites=bs.Sites([bs.Site(LAYER, CHANNEL, "patch", 3000.0, gate=500.0)]),
    )
    with bs.record(model, "block_output", layers=[LAYER]) as rec:
        model(batch)
    assert rec["block_output"][LAYER][..., CHANNEL].abs().max() < 500
    assert not rec["block_output"][LAYER][:, 1, CHANNEL].any()
