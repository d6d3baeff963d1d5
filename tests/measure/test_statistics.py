"""Statistics of `detect` that somebody else writes."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass

import pytest
import torch
from alterations.measures import Kurtosis

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.data.batches import as_batches
from biassurgery.errors import BadOption
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.positions import Positions
from biassurgery.measure.sinks import SinkStatistic
from biassurgery.measure.statistic import STATISTICS, Statistic
from tests.models import (
    CHANNEL,
    LAYER,
    LAYERS,
    PATCHES,
    blocks,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.state import untouched


@torch.no_grad()
def hidden_states(model, ids, mask=None):
    """The output of every block (B, T, D) in float64, by plain hooks."""
    seen = []
    handles = [
        block.register_forward_hook(
            lambda m, a, output: seen.append(
                (output if torch.is_tensor(output) else output[0]).double()
            )
        )
        for block in blocks(model, "llama")
    ]
    model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def written_out(values):
    """By the definition, the mean taken off first."""
    centred = values - values.mean()
    return ((centred**4).mean() / (centred**2).mean() ** 2).item()


def test_a_statistic_from_outside_against_arithmetic():
    model = planted("llama")
    ids = tokens(rows=2, length=14)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    plain = bs.detect(model, [{"input_ids": ids, "attention_mask": mask}])
    with untouched(model, ids):
        found = bs.detect(
            model, [{"input_ids": ids, "attention_mask": mask}], statistics=("kurtosis",)
        )
    states = hidden_states(model, ids, mask)
    wanted = [written_out(state[mask.bool()]) for state in states]
    assert list(found.statistics) == ["kurtosis"]
    assert list(found.statistics["kurtosis"]) == list(range(LAYERS))
    assert list(found.statistics["kurtosis"].values()) == pytest.approx(wanted, rel=1e-6)
    assert wanted[LAYER] > 10 * wanted[LAYER - 1]  # the planted values are there to be seen
    assert plain.statistics == {}
    assert (found.sites, found.layers) == (plain.sites, plain.layers)
    assert everything(found.sinks) == everything(plain.sinks)


def everything(result):
    """All numbers of a result as text, in which NaN is equal to NaN."""
    return repr(asdict(result) if is_dataclass(result) else result)


def counted(model, kind, batches):
    """One statistic after a pass over data."""
    host = find_host(model)
    massive = MassiveActivations(host)
    if kind in (Positions, SinkStatistic):  # where the values are that this one finds to be massive
        statistic = kind(host, Candidates(massive))
    else:
        statistic = kind(host)
    Pass(host, 100.0, 1000.0, [massive, statistic]).read(as_batches(host, batches), "", False)
    return statistic


OWN = (
    "massive_activations",
    "magnitudes",
    "outlier_features",
    "uniform_channels",
    "positions",
    "grid",
    "sinks",
)  # and massive_tokens, which needs a tokenizer


@pytest.mark.parametrize("name", [*OWN, "kurtosis"])
@pytest.mark.parametrize("image", [False, True])
def test_two_halves_add_up_to_the_whole(name, image):
    model = planted_vit() if image else planted("llama")
    halves = [images(3, seed=1), images(2, seed=2)] if image else [tokens(3), tokens(2, seed=7)]
    kind = STATISTICS.find(name)
    first, second = (counted(model, kind, [half]) for half in halves)
    apart = [everything(first.result()), everything(second.result())]
    merged = (first + second).result()
    whole = counted(model, kind, halves).result()
    assert everything(merged) == everything(whole)
    assert [everything(first.result()), everything(second.result())] == apart  # neither has changed


def test_massive_values_are_shown_where_they_are():
    """What a statistic is shown: the planted patches, in the planted channel."""
    seen = {}

    class Where(Statistic):
        name = "where"

        def see(self, output):
            channels, massive = output.massive
            seen[output.layer] = (channels.tolist(), massive.nonzero()[:, 1].tolist())
            assert output.real.all()
            assert output.roles[0].tolist() == [0] + [1] * (output.hidden.shape[1] - 1)
            torch.testing.assert_close(output.magnitude, output.hidden.abs())

        def result(self):
            return seen

    try:
        bs.detect(planted_vit(), [images(1)], statistics="where")
    finally:
        del STATISTICS._classes["where"]
    assert seen[LAYER - 1] == ([], [])
    assert seen[LAYER] == ([CHANNEL], [patch + 1 for patch in PATCHES])


def test_names():
    model = planted("llama")
    with untouched(model, tokens()), pytest.raises(BadOption) as caught:
        bs.detect(model, [tokens()], statistics=("kurtosis", "skewness"))
    assert "'skewness'" in str(caught.value)
    assert all(name in str(caught.value) for name in (*OWN, "kurtosis"))
    with pytest.raises(BadOption, match=r"'kurtosis'.* is taken by .*Kurtosis"):
        type("Other", (Kurtosis,), {"name": "kurtosis"})
    assert STATISTICS.find("kurtosis") is Kurtosis
    again = type("Kurtosis", (Kurtosis,), {"name": "kurtosis", "__module__": Kurtosis.__module__})
    assert STATISTICS.find("kurtosis") is again  # a notebook cell that is run again
    STATISTICS._classes["kurtosis"] = Kurtosis
    type("WithoutName", (Kurtosis,), {})  # a base for others
    assert STATISTICS.find("kurtosis") is Kurtosis


def test_own_statistics_can_be_asked_for_by_name():
    found = bs.detect(planted("llama"), [tokens()], statistics=("magnitudes", "sinks"))
    assert found.statistics["magnitudes"] == found.layers
    assert everything(found.statistics["sinks"]) == everything(found.sinks)


def test_an_error_in_a_statistic_leaves_the_model_as_it_was():
    class Broken(Statistic):
        name = "broken"

        def see(self, output):
            if output.layer == 2:
                raise KeyboardInterrupt

        def result(self):
            raise AssertionError("never reached")

    model = planted("llama").train()
    try:
        with untouched(model, tokens()), pytest.raises(KeyboardInterrupt):
            bs.detect(model, [tokens()], statistics="broken")
    finally:
        del STATISTICS._classes["broken"]
    assert all(module.training for module in model.modules())
