"""Key values of models that quantise their activations: refused for the reason that is the case."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.rounding import rounding
from biassurgery.measure.transplanted import ROUNDINGS
from tests import models
from tests.state import output_of, untouched

IDS = models.tokens(rows=2, length=12)


def of_torchao(model: Any) -> Any:
    """int8 with a scale for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def of_torch(model: Any) -> Any:
    """int8 with one scale for all tokens of a batch."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("quantise", [of_torchao, of_torch])
def test_the_reason_is_the_rounding_and_the_advice_holds(quantise: Any) -> None:
    plain = models.planted("llama")
    key_values = bs.calibrate_key_values(plain, IDS)
    wanted = output_of(plain, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantise(copy.deepcopy(plain))
    before = output_of(model, IDS)
    own = relative(before, wanted)
    with pytest.raises(UnsupportedModel, match="rounds its") as raised:
        bs.calibrate_key_values(model, IDS)
    assert torch.equal(output_of(model, IDS), before)
    error, rounded = map(float, re.findall(r"off by ([\d.e-]+) ", str(raised.value)))
    assert 1e-4 < error <= ROUNDINGS * rounded
    assert "this architecture" not in str(raised.value)
    with bs.patched(model, "transplant", key_values=key_values):
        transplanted = output_of(model, IDS[:, 1:])
    # As near to the model before it was quantised as the quantised one is with its start token.
    assert relative(transplanted, wanted[:, 1:]) < 2 * own
    assert relative(output_of(model, IDS[:, 1:]), wanted[:, 1:]) > 2 * own


def test_a_model_that_does_not_quantise_does_not_round() -> None:
    model = models.planted("llama")

    def run(batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    with untouched(model, IDS):
        assert 0 < rounding(find_host(model), "input_ids", IDS[:1], run) < 1e-4
        embeddings = model.get_input_embeddings()(IDS[:1]).detach()
        assert 0 < rounding(find_host(model), "inputs_embeds", embeddings, run) < 1e-4
