"""Every causal-LM type of the installed transformers, block by block: the same bits, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import biassurgery as bs
from tests import models
from tests.census import expected
from tests.census.examine import batch_of
from tests.census.tiny import tiny_model
from tests.measure.killing import bits
from tests.measure.test_by_blocks import bits_or_refusal

pytestmark = pytest.mark.long
OF_4 = transformers.__version__.startswith("4.")
# Of transformers 5.24: those whose blocks hand on more than one hidden state.
REFUSED = {
    "deepseek_v4",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm_moe_dsa",
    "hy_v4",
    "mllama",
    "recurrent_gemma",
    "xlstm",
    "zaya",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", expected.TYPES)
def test_type(model_type: str) -> None:
    options: Any = {"min_magnitude": 1.0, "min_ratio": 2.0, "progress": False}
    try:
        model = tiny_model(model_type).eval()
        batch = batch_of(model_type)
        data = [batch, {name: values.flip(1)[:1] for name, values in batch.items()}]
        found = bits(bs.detect(model, data, **options))
    except Exception as error:  # noqa: BLE001  # whatever transformers raises, or our refusal
        pytest.skip(f"not measured the ordinary way: {error}")
    here, refusal = bits_or_refusal(bs.detect, model, data, **options)
    if refusal:
        assert "leave onload= out" in refusal
    else:
        assert here == found
    assert OF_4 or bool(refusal) == (model_type in REFUSED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", expected.TYPES)
def test_key_values_of_type(model_type: str) -> None:
    """With the trial of the transplant, which continues a cache block by block."""
    ids = 5 + models.tokens(rows=2) % 50
    data = [ids, ids[:1].flip(1)]
    try:
        model = tiny_model(model_type).eval()
        found = bits(bs.calibrate_key_values(model, data, progress=False))
    except Exception as error:  # noqa: BLE001  # whatever transformers raises, or our refusal
        pytest.skip(f"not measured the ordinary way: {error}")
    here, refusal = bits_or_refusal(bs.calibrate_key_values, model, data, progress=False)
    assert here == found or "leave onload= out" in refusal
    assert OF_4 or bool(refusal) == (model_type in REFUSED)
