"""The encoders of T5 and UMT5 by themselves, against their own hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.state import untouched

CHANNEL = 7
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 4,
    "num_heads": 4,
}
ENCODERS = [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)]


def planted(kind: Any, config: Any) -> Any:
    """Token 1 brings a large value into the residual stream, where it stays."""
    torch.manual_seed(0)
    model = kind(config(**SIZES)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[1, CHANNEL] = 5e5
    return model


def tokens() -> torch.Tensor:
    ids = torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    return ids


@pytest.mark.parametrize(("kind", "config"), ENCODERS)
def test_calibrate_and_detect(kind: Any, config: Any) -> None:
    model = planted(kind, config)
    ids = tokens()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    with untouched(model):
        sites = bs.calibrate(model, ids)
        detection = bs.detect(model, ids)
    assert sites.layers() == [0, 1, 2, 3]
    for layer in range(3):  # behind the last block comes a norm
        (site,) = sites.at(layer)
        assert (site.channel, site.role, site.count) == (CHANNEL, "start", 3)
        values = hidden[layer + 1][:, 0, CHANNEL].double()
        assert site.mean == pytest.approx(values.mean().item(), rel=1e-6)
    assert detection.sites == sites
    assert (detection.sinks is None) == bool(detection.no_sinks)  # transformers 4 has no way to it


@pytest.mark.parametrize(("kind", "config"), ENCODERS)
def test_modes_on_activations(kind: Any, config: Any) -> None:
    model = planted(kind, config)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    sites = bs.calibrate(model, batch)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        with untouched(model), bs.patched(model, "set_mean", sites=sites):
            assert (model(**batch).last_hidden_state - before).abs().max() < 1e-4
        with bs.patched(model, "set_zero", sites=sites, layers=[1]):
            after = model(**batch, output_hidden_states=True)
        assert (after.hidden_states[2][:, 0, CHANNEL] == 0).all()
        assert (after.last_hidden_state - before).abs().max() > 0.1
        assert torch.equal(model(**batch).last_hidden_state, before)


@pytest.mark.parametrize(("kind", "config"), ENCODERS)
def test_what_an_encoder_does_not_have_is_refused(kind: Any, config: Any) -> None:
    model = planted(kind, config)
    ids = tokens()
    with untouched(model), pytest.raises(UnsupportedModel, match="attends in both directions"):
        bs.calibrate_key_values(model, ids)
    with untouched(model), pytest.raises(UnsupportedModel, match="attends in both directions"):
        bs.perplexity(model, ids)


def test_a_model_with_a_decoder_is_another() -> None:
    model = T5ForConditionalGeneration(T5Config(**SIZES)).eval()
    with pytest.raises(UnsupportedModel, match="encoder and a decoder"):
        bs.calibrate(model, tokens())
