"""Diagnoses of models whose blocks hold more than linear layers that read every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.adapters.linears import is_linear
from biassurgery.errors import BadBatch
from biassurgery.integrations.torchao import quantize_static
from tests.census.tiny import MAJOR, tiny_model
from tests.models import LAYERS, planted, tokens


def test_experts_are_said_to_be_left_out():
    """transformers 5 stacks them, 4 has linear layers of each, which read some tokens."""
    model = planted("mixtral")
    found = bs.diagnose(model, tokens(rows=3, length=32), measure=True)
    each = 1 if MAJOR > 4 else 3 * model.config.num_local_experts
    assert len(found.not_told) == LAYERS * each
    assert all(".experts" in name for name in found.not_told)
    for line in found.verdict[1:3]:  # int8 and float16 speak of what was looked at
        assert line.endswith(f"({len(found.not_told)} more not looked at)")
    assert {row.name for row in found.linears}.isdisjoint(found.not_told)
    cells = {row.quantisation: row.perplexity for row in found.measured if row.remedy == "as it is"}
    assert cells["static"] is not None
    assert cells["static"] != cells["float"]
    assert any("are not rounded" in note for note in found.notes)


def test_a_model_without_experts_leaves_nothing_out():
    found = bs.diagnose(planted("llama"), tokens(rows=3))
    assert found.not_told == ()
    assert not any("not looked at" in line for line in found.verdict)


ROUTERS = ["llama4_text", "phimoe"] + ["kimi_linear"] * (MAJOR > 4)


@pytest.mark.parametrize("model_type", ROUTERS)
def test_routers_and_norms_are_no_linear_layers(model_type):
    """`Llama4Router` derives from nn.Linear and returns two tensors; "KimiLinear" has norms."""
    model = tiny_model(model_type)
    found = bs.diagnose(model, torch.randint(3, 60, (2, 24)))
    for row in found.linears:
        module: Any = model.get_submodule(row.name)
        x = torch.randn(1, 3, module.in_features)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
    routers = [m for _, m in model.named_modules() if "Router" in type(m).__name__]
    assert not any(map(is_linear, routers))
    assert routers or MAJOR < 5


def test_cross_attention_reads_tokens_of_the_encoder_as_many_as_they_may_be():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    config = transformers.T5Config(**sizes, num_layers=3)
    decoder = transformers.T5ForConditionalGeneration(config).eval().get_decoder()
    ids = torch.randint(3, 64, (2, 12))
    states = torch.randn(2, 12, 32) * torch.linspace(1, 500, 12)[:, None]

    def diagnosed(encoder: Tensor) -> bs.Diagnosis:
        return bs.diagnose(decoder, {"input_ids": ids, "encoder_hidden_states": encoder})

    found = diagnosed(states)
    assert found.not_told == tuple(
        f"block.{layer}.layer.1.EncDecAttention.{name}" for layer in range(3) for name in "kv"
    )
    assert not any(row.name in found.not_told for row in found.linears)
    assert found.not_told == diagnosed(states[:, :9]).not_told
    assert any(row.name.endswith("EncDecAttention.q") for row in found.linears)


@pytest.mark.skipif(MAJOR > 4, reason="transformers 5 stacks experts: they have no linear layers")
def test_scales_of_experts_behind_padding_are_refused():
    pytest.importorskip("torchao", reason="pip install torchao")
    model, ids = planted("mixtral"), F.pad(tokens(rows=4, length=32), (4, 0), value=5)
    before = model(ids).logits
    mask = (torch.arange(36) >= 4).long().expand(4, -1)
    with pytest.raises(BadBatch, match="some tokens only"):
        quantize_static(model, {"input_ids": ids, "attention_mask": mask}, quantiles=(1.0,))
    assert torch.equal(model(ids).logits, before)
