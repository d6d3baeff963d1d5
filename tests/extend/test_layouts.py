"""A block edit of another package's mode on a model whose tokens come before its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import XLNetConfig, XLNetLMHeadModel

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.extend import BlockEdit, Mode, Place, layer_indices
from tests import models
from tests.state import output_of, untouched


class Silence(BlockEdit):
    """The second token of every sequence becomes zero."""

    def forward(self, hidden: torch.Tensor, start: int | torch.Tensor = 0) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, 1] = 0
        return hidden


@dataclass(frozen=True)
class SilenceToken(Mode):
    """The second token of every sequence becomes zero at the output of a block."""

    name: ClassVar[str] = "silence_token"
    needs_sites: ClassVar[bool] = False

    def places(self, host, sites, layers):
        return [
            Place(layer, host.blocks[layer], Silence()) for layer in layer_indices(host, layers)
        ]


def test_it_reads_the_axes_of_its_host() -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=96, d_model=32, n_layer=3, n_head=4, d_inner=64)
    model = XLNetLMHeadModel(config).eval()
    ids = models.tokens(rows=3)
    assert find_host(model).layout == "TBD"
    with untouched(model, ids), bs.record(model, "block_output", layers=1) as plain:
        output_of(model, ids)
    with (
        untouched(model, ids),
        bs.patched(model, "silence_token", layers=1),
        bs.record(model, "block_output", layers=1) as changed,
    ):
        output_of(model, ids)
    before = plain["block_output"][1]
    after = changed["block_output"][1]
    assert (after[:, 1] == 0).all()
    rest = torch.arange(before.shape[1]) != 1
    assert torch.equal(after[:, rest], before[:, rest])
