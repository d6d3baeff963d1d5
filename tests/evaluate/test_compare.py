"""The table of interventions against patches by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, LayerOutOfRange, UnknownMode
from biassurgery.evaluate import Comparison, compare, perplexity
from biassurgery.modes import Noise, SetMean, SetValue, SetZero, ZeroRandom, defaults
from tests.models import planted, tokens
from tests.state import untouched


@pytest.fixture(scope="module")
def found() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens(4, 24, seed=1)])


def measure(model: Any) -> float:
    return perplexity(model, [tokens(4, 24, seed=7)])


def test_every_mode_as_if_patched_by_hand(found: bs.Sites) -> None:
    model = planted("llama")
    by_hand = {"original": measure(model)}
    for mode in ("set_zero", "set_mean", "zero_random"):
        bs.patch_model(model, mode, sites=found)
        by_hand[mode] = measure(model)
        bs.unpatch_model(model)
    with untouched(model, tokens()):
        table = compare(model, measure, [None, "set_zero", "set_mean", "zero_random"], sites=found)
    assert [row.label for row in table.rows] == list(by_hand)
    assert {label: table[label] for label in by_hand} == by_hand
    assert table[None] == by_hand["original"]
    assert table[SetZero()] == by_hand["set_zero"]
    assert table["set_mean"] == pytest.approx(table[None], rel=1e-4)
    assert abs(math.log(table["set_zero"] / table[None])) > 0.02
    frame = table.to_pandas()
    assert frame["value"].to_dict() == by_hand
    assert frame.index.name == "mode"


def test_several_numbers_and_mode_objects(found: bs.Sites) -> None:
    model = planted("llama")
    layer = found.layers()[0]

    def evaluate(host: Any) -> dict[str, Any]:
        patches = bs.patches(host)
        return {
            "patches": len(patches),
            "layers": torch.tensor(len(patches[0].layers) if patches else 0),
        }

    modes = ["set_mean", SetValue(5.0), SetValue(6.0), Noise(), None]
    table = compare(model, evaluate, modes, sites=found, layers="all")
    assert [row.label for row in table.rows] == [
        "set_mean",
        "set_value(value=5.0)",
        "set_value(value=6.0)",
        "noise",
        "original",
    ]
    every = {"patches": 1.0, "layers": float(len(found.layers()))}
    assert [row.values for row in table.rows] == [every] * 4 + [{"patches": 0.0, "layers": 0.0}]
    assert table[SetValue(6.0)] == every
    assert table["set_value(value=5.0)"] == every
    with pytest.raises(BadOption, match=r"'set_value' names 2 rows.*set_value\(value=5.0\)"):
        table["set_value"]
    with pytest.raises(BadOption, match="'shuffle' names 0 rows"):
        table["shuffle"]
    assert (
        compare(model, evaluate, ["set_mean"], sites=found, layers=[layer])["set_mean"]["layers"]
        == 1
    )


def test_options_go_to_the_modes_that_have_them(found: bs.Sites) -> None:
    model = planted("llama")
    seen = []

    def evaluate(host: Any) -> float:
        seen.extend(patch.mode for patch in bs.patches(host))
        return 0.0

    table = compare(
        model, evaluate, ["set_zero", "set_value", "noise"], sites=found, value=3.0, scale=2.0
    )
    assert seen == [SetZero(), SetValue(3.0), Noise(2.0)]
    assert table["set_value"] == 0.0
    for options, modes in (
        ({"value": 3.0}, [None, "set_zero"]),
        ({"seed": 1}, ["set_zero", ZeroRandom()]),
    ):
        with pytest.raises(BadOption, match=f"no mode given by name has '{next(iter(options))}'"):
            compare(model, evaluate, modes, sites=found, **options)


def test_patches_that_are_there_stay(found: bs.Sites) -> None:
    model = planted("llama")
    bs.patch_model(model, "set_mean", sites=found)
    table = compare(model, lambda host: len(bs.patches(host)), [None, "set_zero"], sites=found)
    assert (table[None], table["set_zero"]) == (1, 2)
    assert [patch.mode for patch in bs.patches(model)] == [SetMean()]


def test_an_exception_leaves_the_model_as_it_was(found: bs.Sites) -> None:
    model = planted("llama")

    def evaluate(host: Any) -> float:
        if bs.patches(host):
            raise RuntimeError("out of memory")
        return 1.0

    with untouched(model, tokens()), pytest.raises(RuntimeError, match="out of memory"):
        compare(model, evaluate, sites=found)


@pytest.mark.parametrize(
    ("modes", "options", "error", "message"),
    [
        ([None, "set_maen"], {}, UnknownMode, "set_maen"),
        ([None, "set_value"], {}, BadOption, "needs value="),
        ([None, "set_mean"], {"layers": [99]}, LayerOutOfRange, "99"),
        ([None, "set_mean", "set_mean"], {}, BadOption, "'set_mean' is there twice"),
        ([None, "original"], {}, BadOption, "'original' is there twice"),
        ([], {}, BadOption, "modes: "),
        ("set_mean", {}, BadOption, "give a list"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_anything_is_evaluated(
    found: bs.Sites, modes: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = planted("llama")
    calls = []
    with untouched(model), pytest.raises(error, match=message):
        compare(model, calls.append, modes, sites=found, **options)  # type: ignore[arg-type]
    assert calls == []


@pytest.mark.parametrize(
    ("result", "message"),
    [("good", "number"), (None, "number"), ({}, "empty dict"), (torch.zeros(2), "number")],
)
def test_evaluate_must_return_numbers(found: bs.Sites, result: Any, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        compare(planted("llama"), lambda _: result, sites=found)


def test_evaluate_must_return_the_same_names(found: bs.Sites) -> None:
    with pytest.raises(BadOption, match="same names"):
        compare(planted("llama"), lambda host: {f"value_{len(bs.patches(host))}": 1.0}, sites=found)


def test_sites_that_are_not_given_are_looked_up_once(
    found: bs.Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def look_up(model: Any, host: Any, start: int | None = None) -> bs.Sites:
        calls.append(model)
        return found

    monkeypatch.setattr(defaults, "default_sites", look_up)
    model = planted("llama")
    table = compare(model, measure, [None, "set_zero", "set_mean"])
    assert calls == [model]
    assert table["set_zero"] == compare(model, measure, ["set_zero"], sites=found)["set_zero"]
    compare(model, measure, [None, SetValue(0.0, channels=(1,), positions=(0,))], layers=[0])
    assert len(calls) == 1  # nothing there needs sites


def test_the_table_prints(found: bs.Sites) -> None:
    table: Comparison = compare(
        planted("llama"),
        lambda host: {"perplexity": math.inf if bs.patches(host) else 12.5, "top1": 0.8125},
        [None, "set_zero"],
        sites=found,
    )
    lines = [line.split() for line in str(table).splitlines() if line.split()]
    assert ["mode", "perplexity", "top1"] in lines
    assert ["original", "12.50", "81.25", "%"] in lines
    assert ["set_zero", "inf", "81.25", "%"] in lines


def test_what_is_no_function_is_refused():
    model = planted("llama")
    with pytest.raises(BadOption, match=r"evaluate: a list.*function"):
        bs.compare(model, [tokens(1)], modes=[None])
