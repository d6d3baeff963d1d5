"""The public names: what is where, that old ones lead there, and that each is described."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import typing
import warnings
from typing import Any

import pytest

import biassurgery as bs

ROOMS = ("errors", "evaluate", "extend", "modes", "plots")
OLD = """
Adapter AlreadyPatched AttentionBias BadBatch BadOption BatchTooSmall CalibrationRequired
Comparison Detection FileError FixRegisters ImageAdapter IncompatibleSites Instrument KeyValues
LayerOutOfRange LevelOverflow LinearHead MassiveRegister MissingPackage Mode NoSites Noise
NonFiniteActivation NotPatched Origin Patch Record RegisterMeans RegisterNeurons SetMean SetValue
SetZero Shuffle SinkCache Site Sites Support SupportMatrix SurgeryError TestTimeRegisters
TextAdapter Transplant UnknownMode UnsupportedModel ZeroRandom attention_by_role calibrate
calibrate_key_values calibrate_registers class_and_patch_features cls_attention compare detect
find_register_neurons fit_linear_head image_features imagenet_prompts knn_accuracy linear_accuracy
load_patch patch_model patched patches perplexity plots push_to_hub record register_adapter
save_patch streaming_perplexity supported top1_accuracy unpatch_model zero_shot_accuracy
zero_shot_head
""".split()  # noqa: SIM905  (one a line would be 76 lines)


def names_of(module: Any) -> list[str]:
    """What a room has to offer: what `__all__` says, else the classes it has."""
    return list(getattr(module, "__all__", ())) or [
        name
        for name, thing in vars(module).items()
        if isinstance(thing, type) and not name.startswith("_") and name != "Any"
    ]


PUBLIC = {
    f"{place}.{name}".removeprefix("."): getattr(bs if not place else getattr(bs, place), name)
    for place in ("", *ROOMS)
    for name in names_of(bs if not place else getattr(bs, place))
}
THINGS = {name: thing for name, thing in PUBLIC.items() if not inspect.ismodule(thing)}
THINGS = {name: thing for name, thing in THINGS.items() if typing.get_origin(thing) is None}
FUNCTIONS = {name: thing for name, thing in THINGS.items() if inspect.isfunction(thing)}


def methods() -> dict[str, Any]:
    """The public methods that the public classes of this library define."""
    found = {}
    for name, cls in THINGS.items():
        for attribute, method in vars(cls).items() if inspect.isclass(cls) else ():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if inspect.isfunction(function) and not attribute.startswith("_"):
                found[f"{name}.{attribute}"] = (cls, function)
    return found


def test_the_top_holds_the_everyday_names():
    assert bs.__all__ == sorted(bs.__all__)
    assert len(bs.__all__) <= 45
    assert all(hasattr(bs, name) for name in bs.__all__)
    for room in ROOMS:
        listed = getattr(getattr(bs, room), "__all__", [])
        assert listed == sorted(listed, key=lambda name: (not name.isupper(), name))


def test_every_mode_of_this_library_is_among_the_names_of_its_room():
    modes = [mode for mode in bs.modes.MODES.values() if mode.__module__.startswith("biassurgery.")]
    assert {mode.__name__ for mode in modes} == set(bs.modes.__all__) - {"Layers", "Mode"}


def old_place(name: str) -> Any:
    return getattr(bs, name)


def test_every_old_name_leads_to_its_new_place():
    assert len(OLD) == 76
    for name in OLD:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            thing = old_place(name)
        if name in bs.__all__:
            assert told == []
            continue
        (warning,) = told
        assert warning.category is DeprecationWarning
        assert warning.filename == __file__
        place = str(warning.message).split(" is ")[1].split(" now")[0]
        module, _, attribute = place.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is thing
        assert attribute in (name, "Incompatible")


def test_a_caller_is_told_once_a_line():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            bs.SetMean  # noqa: B018
        bs.SetMean  # noqa: B018
        from biassurgery import SetZero  # noqa: F401
    assert [warning.filename for warning in told] == [__file__] * 3


def test_what_was_never_there():
    with pytest.raises(AttributeError, match="has no attribute 'SetMedian'"):
        bs.SetMedian  # noqa: B018
    with pytest.raises(ImportError):
        from biassurgery import set_median  # noqa: F401


def test_no_module_takes_the_place_of_a_function():
    """Importing `package.name` sets the attribute `name` of the package."""
    for name in THINGS:
        place, _, attribute = f"biassurgery.{name}".rpartition(".")
        package = importlib.import_module(place)
        if hasattr(package, "__path__"):
            assert importlib.util.find_spec(f"{place}.{attribute}") is None, name


def test_importing_all_of_it_costs_no_more_than_torch():
    code = (
        "import sys, biassurgery as bs; bs.extend.Bias, bs.modes.SetMean, bs.evaluate.LinearHead;"
        " heavy = {'transformers', 'timm', 'open_clip', 'rich', 'typer', 'matplotlib', 'pandas'};"
        " print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", THINGS)
def test_every_public_name_says_what_it_is(name):
    text = vars(THINGS[name]).get("__doc__") if inspect.isclass(THINGS[name]) else None
    if inspect.isfunction(THINGS[name]):
        text = inspect.getdoc(THINGS[name])
    assert text, name
    assert len(text.split()) >= 4
    assert text.rstrip().endswith((".", ")", "`", "]"))


@pytest.mark.parametrize("name", [n for n in THINGS if dataclasses.is_dataclass(THINGS[n])])
def test_every_dataclass_tells_of_its_fields(name):
    text = THINGS[name].__doc__
    for field in dataclasses.fields(THINGS[name]):
        assert re.search(rf"\b{field.name}\b", text), field.name


def arguments(function: Any) -> list[str]:
    """The parameters that a docstring should tell of."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "cls")]


def section(text: str, title: str) -> str:
    """The lines of a section of a docstring, up to the next one."""
    lines = text.split("\n")
    if f"{title}:" not in lines:
        return ""
    below = lines[lines.index(f"{title}:") + 1 :]
    ends = [index for index, line in enumerate(below) if line and not line.startswith(" ")]
    return "\n".join(below[: ends[0]] if ends else below)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_tells_of_its_arguments_and_errors(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    told = section(text, "Args")
    for argument in arguments(FUNCTIONS[name]):
        assert f"{argument}:" in told or f"{argument}," in told, argument
    if arguments(FUNCTIONS[name]):
        assert section(text, "Raises"), "Raises"


@pytest.mark.parametrize("name", methods())
def test_every_public_method_says_what_it_does(name):
    cls, function = methods()[name]
    assert inspect.getdoc(getattr(cls, function.__name__)), name
