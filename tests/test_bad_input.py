"""Everything that can be wrong with what a user passes: an error of this library that says what and
what to do, the model untouched.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import biassurgery as bs
from tests import models
from tests.models import CHANNEL, LAYER
from tests.state import untouched

IDS = models.tokens(rows=2, length=12)
PADDED = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}
SITES = bs.Sites(
    [
        bs.Site(LAYER, CHANNEL, "start", 3000.0, gate=700.0),
        bs.Site(LAYER, CHANNEL, "elsewhere", 9000.0, gate=700.0),
    ]
)
SITE = SITES[0]
Call = Callable[[Any], Any]
FUNCTIONS = (bs.patch_model, bs.unpatch_model, bs.calibrate, bs.load_patch, bs.Sites.load)
ARGUMENTS = {"value", "channels", "positions", "scale", "seed"} | {
    name for f in FUNCTIONS for name in inspect.signature(f).parameters
}


def check(
    model: Any, call: Call, error: type[bs.SurgeryError], pattern: str, batch: Any = IDS
) -> None:
    """That the call is refused as it should be, by a message that begins with the argument and is
    more than a word.
    """
    with untouched(model, batch), pytest.raises(error) as raised:
        call(model)
    message = str(raised.value)
    assert type(raised.value) is error
    assert re.search(pattern, message, re.DOTALL), message
    assert message.split(":")[0] in ARGUMENTS, message
    assert len(message) >= 40, message


def cases(table: dict[str, tuple[Any, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name) for name, case in table.items()]
    )


# -- batches


@cases(
    {
        "no batches": ([], "none"),
        "no batches from a generator": ((x for x in ()), "none"),
        "no rows": ([torch.zeros(0, 5, dtype=torch.long)], r"empty.*\(0, 5\)"),
        "no tokens": (torch.zeros(2, 0, dtype=torch.long), r"empty.*\(2, 0\)"),
        "an empty batch among others": ([IDS, IDS[:0]], "empty"),
        "all padding": (PADDED, "all padding"),
        "all padding in the second batch": ([IDS, PADDED], "all padding"),
        "nothing": (None, "NoneType"),
        "a number": (5, "int"),
        "a text": ("some text", "str"),
        "a list of texts": (["some text"], "str"),
        "a list of None": ([None], "NoneType"),
        "lists of numbers": ([[1, 2, 3]], "list"),
        "an array": ([np.zeros((2, 3), dtype=np.int64)], "ndarray"),
        "an empty dict": ({}, "input_ids"),
        "a dict of something else": ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "input_ids"),
        "ids that are a list": ({"input_ids": [[1, 2]]}, "input_ids"),
        "one dimension": ([IDS[0]], r"\(12,\).*\(B, T\)"),
        "three dimensions": (IDS[None], r"\(1, 2, 12\).*\(B, T\)"),
        "floats": ([IDS.float()], "float32"),
        "embeddings as ids": ([torch.zeros(1, 4, models.HIDDEN)], "inputs_embeds"),
        "images": ([models.images(2)], "float32"),
        "a mask that is too short": (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 11)},
            r"attention_mask.*\(2, 11\)",
        ),
        "a mask for other rows": (
            {"input_ids": IDS, "attention_mask": torch.ones(3, 12)},
            r"attention_mask.*\(3, 12\)",
        ),
        "a mask of four dimensions": (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)},
            r"attention_mask.*\(2, 1, 12, 12\)",
        ),
    }
)
def test_batches_of_text(case):
    batches, pattern = case
    check(models.planted("llama"), lambda model: bs.calibrate(model, batches), bs.BadBatch, pattern)


@cases(
    {
        "no batches": ([], "none"),
        "no images": ([torch.zeros(0, 3, 28, 28)], "empty"),
        "one image without a batch": ([torch.zeros(3, 28, 28)], r"\(3, 28, 28\)"),
        "bytes": ([torch.zeros(1, 3, 28, 28, dtype=torch.uint8)], "uint8"),
        "token ids": ([IDS], "int64"),
        "a dict of something else": ({"input_ids": IDS}, "pixel_values"),
    }
)
def test_batches_of_images(case):
    batches, pattern = case
    check(
        models.planted_vit(),
        lambda model: bs.calibrate(model, batches),
        bs.BadBatch,
        pattern,
        batch=models.images(2),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_hidden_states_that_are_not_finite(family, value):
    model = models.planted_vit() if family == "timm" else models.planted(family)
    batch = models.images(2) if family == "timm" else IDS
    writer: Any = models.blocks(model, family)[3].get_submodule(models.ANATOMY[family][1][1])
    with torch.no_grad():
        writer.weight[0] = value
    check(
        model,
        lambda m: bs.calibrate(m, batch),
        bs.NonFiniteActivation,
        r"block 3 .*NaN or infinity.*bfloat16",
        batch=batch,
    )


def test_one_bad_value_in_a_later_batch():
    embedded = models.planted("llama").get_input_embeddings()(IDS).detach()
    bad = embedded.clone()
    bad[1, 5, 40] = math.nan
    for batches in ([{"inputs_embeds": embedded}, {"inputs_embeds": bad}],):
        check(
            models.planted("llama"),
            lambda m, b=batches: bs.calibrate(m, b),
            bs.NonFiniteActivation,
            "block 0",
        )
    bad[1, 5] = math.inf
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0  # padding may hold anything
    assert len(
        bs.calibrate(models.planted("llama"), {"inputs_embeds": embedded, "attention_mask": mask})
    )


def test_a_float16_model_that_overflows():
    model = models.planted("llama").half()
    writer: Any = models.blocks(model, "llama")[2].get_submodule("mlp.down_proj")
    with torch.no_grad():
        writer.weight.fill_(60000)
    check(model, lambda m: bs.calibrate(m, IDS), bs.NonFiniteActivation, "block 2")


@pytest.mark.parametrize("name", ["min_magnitude", "min_ratio"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, "100", None, [100]])
def test_thresholds(name, value):
    check(
        models.planted("llama"), lambda m: bs.calibrate(m, IDS, **{name: value}), bs.BadOption, name
    )


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
        check(model, call, bs.UnsupportedModel, "meta device.*load the weights", batch=None)


def test_a_patched_model_patched_again():
    model = bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)
    check(
        model,
        lambda m: bs.patch_model(m, "set_zero", sites=SITES),
        bs.AlreadyPatched,
        "set_zero.*unpatch_model",
    )


def test_a_patch_that_is_not_there():
    for mode in ("set_zero", "no_such_mode", bs.SetMean()):
        check(
            models.planted("llama"),
            lambda m, mode=mode: bs.unpatch_model(m, mode),
            bs.NotPatched,
            "nothing",
        )


# -- modes and their options


@pytest.mark.parametrize("mode", ["set_maen", "", None, 3, bs.SetMean, ["set_mean"], {}])
def test_unknown_modes(mode):
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, mode, sites=SITES),
        bs.UnknownMode,
        "'set_mean', 'set_zero'",
    )


@cases(
    {
        "an option of another mode": ("set_mean", {"scale": 1.0}, "scale"),
        "a misspelt option": ("noise", {"scael": 1.0}, "'scael'.*'scale'"),
        "no value": ("set_value", {}, "value="),
        "options beside an object": (bs.SetMean(), {"scale": 1.0}, "scale.*object"),
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
        bs.BadOption,
        pattern,
    )


def test_options_of_a_mode_object():
    for make in (
        lambda: bs.Noise(scale=-1.0),
        lambda: bs.SetValue(math.nan),
        lambda: bs.ZeroRandom(seed="1"),  # type: ignore[arg-type]
        lambda: bs.SetValue(1.0, channels=(1,)),
    ):
        with pytest.raises(bs.BadOption):
            make()


@cases(
    {
        **{
            f"{value!r} is outside": (value, bs.LayerOutOfRange, "blocks 0 to 4")
            for value in (-1, 5, [1, 7], (-5,))
        },
        **{
            f"{value!r} has no sites": (value, bs.LayerOutOfRange, r"no sites.*\[1\]")
            for value in (0, [1, 2])
        },
        **{
            f"{value!r} are no layers": (value, bs.BadOption, "layers")
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
        "none": (bs.Sites(), bs.NoSites, "empty.*detect.*min_ratio="),
        "none in a list": ([], bs.NoSites, "empty"),
        "none, from somewhere": (
            bs.Sites(origin=bs.Origin(source="my text")),
            bs.NoSites,
            "my text",
        ),
        "another architecture": (
            measured(architecture="gpt2", layers=5, width=64),
            bs.IncompatibleSites,
            "'gpt2'.*'llama'",
        ),
        "another depth": (
            measured(architecture="llama", layers=6, width=64),
            bs.IncompatibleSites,
            "layers.*6.*5",
        ),
        "another hidden size": (
            measured(architecture="llama", layers=5, width=65),
            bs.IncompatibleSites,
            "hidden size.*65.*64",
        ),
        "a layer too high": ([replace(SITE, layer=5)], bs.LayerOutOfRange, "layer 5.*5 blocks"),
        "a negative layer": ([replace(SITE, layer=-1)], bs.LayerOutOfRange, "layer -1"),
        "a channel too high": (
            [replace(SITE, channel=64)],
            bs.BadOption,
            "channel 64.*64 channels",
        ),
        "a negative channel": ([replace(SITE, channel=-1)], bs.BadOption, "channel -1"),
        "a mean of NaN": ([replace(SITE, mean=math.nan)], bs.BadOption, "finite"),
        "an infinite mean": ([replace(SITE, mean=math.inf)], bs.BadOption, "finite"),
        "a spread of NaN": ([replace(SITE, std=math.nan)], bs.BadOption, "finite"),
        "a gate of NaN": ([replace(SITE, gate=math.nan)], bs.BadOption, "gate"),
        "an infinite gate": ([replace(SITE, gate=math.inf)], bs.BadOption, "gate"),
        "a negative gate": ([replace(SITE, gate=-1.0)], bs.BadOption, "gate"),
        "a mean of zero without a gate": (
            [replace(SITE, mean=0.0, gate=None)],
            bs.BadOption,
            "gate",
        ),
        "a path": ("sites.safetensors", bs.BadOption, r"Sites\.load"),
        "a number": (5, bs.BadOption, "int.*calibrate"),
        "a list of numbers": ([5], bs.BadOption, "5 is not a Site"),
        "a dict": ({"layer": 1}, bs.BadOption, "Site"),
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
        bs.LevelOverflow,
        "float16.*65504.*bfloat16",
    )
    bs.patch_model(model.bfloat16(), mode, sites=sites, **options)


def test_a_level_that_overflows_at_a_later_layer_only():
    sites = bs.Sites([SITE, replace(SITE, layer=3, mean=70000.0)])
    model = models.planted("llama", torch.float16)
    check(
        model,
        lambda m: bs.patch_model(m, "set_mean", sites=sites, layers="all"),
        bs.LevelOverflow,
        "layer 3",
    )
    bs.patch_model(model, "set_mean", sites=sites)


def test_too_many_sites_for_a_control():
    sites = bs.Sites(bs.Site(1, channel, "start", 3000.0) for channel in range(33))
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "zero_random", sites=sites),
        bs.BadOption,
        "33 of 64",
    )


def test_no_sites_and_nothing_to_calibrate_on():
    check(
        models.planted("llama"),
        lambda m: bs.patch_model(m, "set_mean"),
        bs.CalibrationRequired,
        r"calibrate\(model",
    )


# -- files (those of `Sites` are in findings/test_sites.py)


@pytest.fixture
def saved(tmp_path):
    model = models.planted("llama")
    with (
        bs.patched(model, bs.Noise(scale=0.5), sites=SITES),
        bs.patched(model, "set_zero", sites=SITES),
    ):
        bs.save_patch(model, tmp_path / "patch")
    return tmp_path / "patch"


def loading(folder: Any, error: type[bs.SurgeryError], pattern: str, family: str = "llama") -> None:
    check(models.planted(family), lambda m: bs.load_patch(m, folder), error, pattern)


def test_a_patch_of_another_architecture(saved):
    loading(saved, bs.IncompatibleSites, "architecture.*'llama'.*'gpt2'", family="gpt2")


def test_a_folder_that_is_not_there_or_no_folder(saved, tmp_path):
    loading(tmp_path / "nowhere", bs.FileError, "nowhere")
    loading(saved / "surgery.json", bs.FileError, "surgery.json")


@pytest.mark.parametrize("keep", [0, 1, 20, -2])
@pytest.mark.parametrize("name", ["surgery.json", "surgery.safetensors"])
def test_a_truncated_patch(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    loading(saved, bs.FileError, name)


def test_a_patch_file_of_another_kind(saved):
    content = json.loads((saved / "surgery.json").read_text())
    first = content["patches"][0]
    for wrong in (
        [],
        5,
        "x",
        content | {"format": 99},
        {"format": content["format"]},
        content | {"patches": [{}]},
        content | {"patches": [first | {"mode": "set_maen"}]},
        content | {"patches": [first | {"options": {"scale": "x"}}]},
        content | {"patches": [first | {"sites": {}}]},
        content | {"patches": 3},
    ):
        (saved / "surgery.json").write_text(json.dumps(wrong))
        with untouched(model := models.planted("llama"), IDS), pytest.raises(bs.SurgeryError):
            bs.load_patch(model, saved)
    (saved / "surgery.json").write_bytes(b"\xff\xfe\x00")
    loading(saved, bs.FileError, "surgery.json")


def test_a_patch_that_fails_half_way_is_taken_back(saved):
    """The second of two saved patches is on the model already, so the first must not stay."""
    model = models.planted("llama")
    bs.patch_model(model, "set_zero", sites=SITES)
    check(model, lambda m: bs.load_patch(m, saved), bs.AlreadyPatched, "set_zero")
    assert [patch.mode for patch in bs.patches(model)] == [bs.SetZero()]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with untouched(model, IDS), pytest.raises(bs.FileError, match="file"):
            bs.save_patch(model, folder)
    assert (tmp_path / "file").read_text() == "in the way"


def test_nothing_to_save(tmp_path):
    with (
        untouched(model := models.planted("llama"), IDS),
        pytest.raises(bs.NotPatched, match="nothing is applied"),
    ):
        bs.save_patch(model, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_every_error_is_a_surgery_error():
    errors = [
        kind
        for name in bs.__all__
        if isinstance(kind := getattr(bs, name), type) and issubclass(kind, Exception)
    ]
    assert len(errors) >= 14
    assert all(issubclass(kind, bs.SurgeryError) for kind in errors)
