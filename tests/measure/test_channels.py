"""Outlier features beside massive activations, against counting in float64."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from tests import models


def outputs(model, ids):
    """(L, N, T, D) float64, by hooks of its own."""
    seen = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).double()


@pytest.fixture(scope="module")
def model():
    """Planted massive activations, and an outlier feature: a channel large at all tokens."""
    model = models.planted("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, OUTLIER] = 8.0
    return model


OUTLIER = 20


def test_a_vector_and_a_scalar_are_told_apart(model):
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    found = bs.evaluate.channel_table(model, batches)
    states = torch.cat([outputs(model, ids) for ids in batches], 1)
    magnitude = states.abs()
    medians = magnitude.flatten(2).median(2).values  # (L, N)
    massive = magnitude > (1000 * medians).clamp(min=100)[..., None, None]
    peaks = magnitude.amax(2).mean(1)  # (L, D)
    for one in found.channels:
        at = peaks[:, one.channel].argmax().item()
        assert one.layer == at
        assert one.largest == pytest.approx(peaks[at, one.channel].item(), rel=1e-5)
        here = magnitude[at, ..., one.channel]
        usual = here[~massive[at, ..., one.channel]].mean().item()
        assert one.ordinary == pytest.approx(usual, rel=1e-5)
        above = (magnitude[..., one.channel] > 6).double().mean().item()
        assert one.tokens == pytest.approx(above, abs=1e-12)
        assert one.massive == massive[..., one.channel].sum().item()
    (value,) = found.massive
    assert value.channel == models.CHANNEL
    assert found.channels[OUTLIER].outlier
    assert found.channels[OUTLIER].tokens > 0.9
    assert found.outliers[0].channel == OUTLIER
    assert not found.channels[OUTLIER].massive
    assert value.tokens < 0.1
    assert found.tokens == sum(batch.numel() for batch in batches)
    assert "outlier" in str(found)
    assert found.to_pandas().loc[OUTLIER, "outlier"]


def test_it_is_the_statistic_of_detect_and_agrees_with_its_outlier_features(model):
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    detection = bs.detect(model, batches, statistics="channels")
    table = detection.statistics["channels"]
    assert table == bs.evaluate.channel_table(model, batches)
    assert detection.outlier_features == tuple(c.channel for c in table.channels if c.outlier)
