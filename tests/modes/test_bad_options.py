"""Options, layers, sites and models that are refused, by argument and next step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import (
    BadOption,
    CalibrationRequired,
    Incompatible,
    LayerOutOfRange,
    LevelOverflow,
    NoSites,
    NotPatched,
    UnknownMode,
    UnsupportedModel,
)
from biassurgery.modes import Noise, SetMean, SetValue, ZeroRandom
from tests import models
from tests.refusals import IDS, SITES, cases, check

SITE = SITES[0]


@pytest.mark.parametrize("name", ["min_magnitude", "min_ratio"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, "100", None, [100]])
def test_thresholds(name, value):
    check(models.planted("llama"), lambda m: bs.calibrate(m, IDS, **{name: value}), BadOption, name)


# -- the model


@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_a_model_on_the_meta_device(family):
    model = (models.planted_vit() if family == "timm" else models.planted(family)).to("meta")
    batch = models.images(2) if family == "timm" else IDS
    for call in (
        lambda m: bs.calibrate(m, batch),
        lambda m: bs.patch_model(m, "set_zero", sites=SITES),
        lambda m: bs.patch_model(m, "set_value", value=1.0, channels=0, positions=0, layers=0),
    ):
        check(model, call, UnsupportedModel, "meta device.*load the weights", batch=None)


def test_a_patched_model_patched_again():
    model = bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)
    check(
        model,
        lambda m: bs.patch_model(m, "set_zero", sites=SITES),
        bs.AlreadyPatched,
        "set_zero.*unpatch_model",
    )


def test_a_patch_that_is_not_there():
    for mode in ("set_zero", "no_such_mode", SetMean()):
        check(
            models.planted("llama"),
            lambda m, mode=mode: bs.unpatch_model(m, mode),
            NotPatched,
            "nothing",
        )


# -- modes and their options


@pytest.mark.parametrize("mode", ["set_maen", "", None, 3, SetMean, ["set_mean"], {}])
def test_unknown_modes(mode):
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, mode, sites=SITES),
        UnknownMode,
        "'set_mean', 'set_zero'",
    )


@cases(
    {
        "an option of another mode": ("set_mean", {"scale": 1.0}, "scale"),
        "a misspelt option": ("noise", {"scael": 1.0}, "'scael'.*'scale'"),
        "no value": ("set_value", {}, "value="),
        "options beside an object": (SetMean(), {"scale": 1.0}, "scale.*object"),
        **{
            f"scale {value!r}": ("noise", {"scale": value}, "scale")
            for value in (-1.0, math.nan, math.inf, "1", None)
        },
        **{
            f"seed {value!r}": ("zero_random", {"seed": value}, "seed")
            for value in ("1", 1.5, None)
        },
        **{
            f"value {value!r}": ("set_value", {"value": value}, "value")
            for value in (math.nan, math.inf, "1", None, [1.0])
        },
        "channels alone": ("set_value", {"value": 1.0, "channels": 3}, "positions"),
        "positions alone": ("set_value", {"value": 1.0, "positions": 3}, "channels"),
        **{
            f"channels {value!r}": (
                "set_value",
                {"value": 1.0, "channels": value, "positions": 0, "layers": 0},
                "channels",
            )
            for value in (64, -1, (), (0, 64), "ab", 1.5, (1.5,), (None,))
        },
        **{
            f"positions {value!r}": (
                "set_value",
                {"value": 1.0, "channels": 0, "positions": value, "layers": 0},
                "positions",
            )
            for value in (-1, (), (3, -1), "ab", 1.5, (1.5,), (None,))
        },
        **{
            f"positions in layers {value!r}": (
                "set_value",
                {"value": 1.0, "channels": 0, "positions": 0, "layers": value},
                "layers",
            )
            for value in (None, "first", "all", [], "0", 1.5)
        },
    }
)
def test_options(case):
    mode, options, pattern = case
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, mode, sites=SITES, **options),
        BadOption,
        pattern,
    )


def test_options_of_a_mode_object():
    for make in (
        lambda: Noise(scale=-1.0),
        lambda: SetValue(math.nan),
        lambda: ZeroRandom(seed="1"),  # type: ignore[arg-type]
        lambda: SetValue(1.0, channels=(1,)),
    ):
        with pytest.raises(BadOption):
            make()


@cases(
    {
        **{
            f"{value!r} is outside": (value, LayerOutOfRange, "blocks 0 to 4")
            for value in (-1, 5, [1, 7], (-5,))
        },
        **{
            f"{value!r} has no sites": (value, LayerOutOfRange, r"no sites.*\[1\]")
            for value in (0, [1, 2])
        },
        **{
            f"{value!r} are no layers": (value, BadOption, "layers")
            for value in ([], "last", 1.5, [1.5], True, [None], ["1"], {"a": 1}, math.nan)
        },
    }
)
def test_layers(case):
    layers, error, pattern = case
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "set_zero", sites=SITES, layers=layers),
        error,
        pattern,
    )


# -- sites


def measured(**origin: Any) -> bs.Sites:
    return bs.Sites(list(SITES), origin=bs.Origin(**origin))


@cases(
    {
        "none": (bs.Sites(), NoSites, "empty.*detect.*min_ratio="),
        "none in a list": ([], NoSites, "empty"),
        "none, from somewhere": (
            bs.Sites(origin=bs.Origin(source="my text")),
            NoSites,
            "my text",
        ),
        "another architecture": (
            measured(architecture="gpt2", layers=5, width=64),
            Incompatible,
            "'gpt2'.*'llama'",
        ),
        "another depth": (
            measured(architecture="llama", layers=6, width=64),
            Incompatible,
            "layers.*6.*5",
        ),
        "another hidden size": (
            measured(architecture="llama", layers=5, width=65),
            Incompatible,
            "hidden size.*65.*64",
        ),
        "a layer too high": ([replace(SITE, layer=5)], LayerOutOfRange, "layer 5.*5 blocks"),
        "a negative layer": ([replace(SITE, layer=-1)], LayerOutOfRange, "layer -1"),
        "a channel too high": (
            [replace(SITE, channel=64)],
            BadOption,
            "channel 64.*64 channels",
        ),
        "a negative channel": ([replace(SITE, channel=-1)], BadOption, "channel -1"),
        "a mean of NaN": ([replace(SITE, mean=math.nan)], BadOption, "finite"),
        "an infinite mean": ([replace(SITE, mean=math.inf)], BadOption, "finite"),
        "a spread of NaN": ([replace(SITE, std=math.nan)], BadOption, "finite"),
        "a gate of NaN": ([replace(SITE, gate=math.nan)], BadOption, "gate"),
        "an infinite gate": ([replace(SITE, gate=math.inf)], BadOption, "gate"),
        "a negative gate": ([replace(SITE, gate=-1.0)], BadOption, "gate"),
        "a mean of zero without a gate": (
            [replace(SITE, mean=0.0, gate=None)],
            BadOption,
            "gate",
        ),
        "a path": ("sites.safetensors", BadOption, r"Sites\.load"),
        "a number": (5, BadOption, "int.*calibrate"),
        "a list of numbers": ([5], BadOption, "5 is not a Site"),
        "a dict": ({"layer": 1}, BadOption, "Site"),
    }
)
def test_sites(case):
    sites, error, pattern = case
    for mode in ("set_zero", "shuffle"):
        check(
            models.planted("llama"),
            lambda m, mode=mode: bs.patch_model(m, mode, sites=sites),
            error,
            pattern,
        )


@cases(
    {
        "the mean": ("set_mean", [replace(SITE, mean=70000.0)], {}),
        "a negative mean": ("set_mean", [SITE, replace(SITE, mean=-70000.0)], {}),
        "a value": ("set_value", SITES, {"value": 1e5}),
        "a value at positions": (
            "set_value",
            None,
            {"value": -1e5, "channels": 1, "positions": 0, "layers": 2},
        ),
        "the mean of noise": ("noise", [replace(SITE, mean=70000.0)], {}),
        "noise around a mean that fits": ("noise", [replace(SITE, mean=60000.0, std=5000.0)], {}),
    }
)
def test_a_level_that_overflows(case):
    mode, sites, options = case
    model = models.planted("llama", torch.float16)
    check(
        model,
        lambda m: bs.patch_model(m, mode, sites=sites, **options),
        LevelOverflow,
        "float16.*65504.*bfloat16",
    )
    bs.patch_model(model.bfloat16(), mode, sites=sites, **options)


def test_a_level_that_overflows_at_a_later_layer_only():
    sites = bs.Sites([SITE, replace(SITE, layer=3, mean=70000.0)])
    model = models.planted("llama", torch.float16)
    check(
        model,
        lambda m: bs.patch_model(m, "set_mean", sites=sites, layers="all"),
        LevelOverflow,
        "layer 3",
    )
    bs.patch_model(model, "set_mean", sites=sites, layers=SITE.layer)


def test_too_many_sites_for_a_control():
    sites = bs.Sites(bs.Site(1, channel, "start", 3000.0) for channel in range(33))
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "zero_random", sites=sites),
        BadOption,
        "33 of 64",
    )


def test_no_sites_and_nothing_to_calibrate_on():
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "set_mean"),
        CalibrationRequired,
        r"calibrate\(model",
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, None, "3", torch.ones(2)])
@pytest.mark.parametrize("method", ["write", "spread"])
def test_a_mode_that_writes_no_finite_number(monkeypatch, method, number):
    monkeypatch.setattr(SetMean, method, lambda self, site: number)
    if (method, number) == ("spread", None):  # no noise
        bs.patch_model(models.planted("llama"), "set_mean", sites=SITES)
        return
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "set_mean", sites=SITES),
        BadOption,
        rf"mode: {method}\(\) of set_mean gives .* a finite number",
    )
