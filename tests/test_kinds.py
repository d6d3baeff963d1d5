"""What comes in kinds: a class is known by being defined; a name that is taken is refused."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from torch import nn

import biassurgery as bs
from biassurgery import kinds
from biassurgery.edits.bias import BIASES, Bias
from biassurgery.errors import BadOption, UnknownMode
from biassurgery.kinds import Kinds
from biassurgery.modes import MODES, Mode, SetMean
from biassurgery.modes.massive import SiteMode, WriteMode
from tests.models import planted, tokens
from tests.state import untouched


class FakeEntryPoint:
    """One that defines a class or fails when it is loaded."""

    name = "fake"
    value = "fake.module"

    def __init__(self, load: Any) -> None:
        self.load = load


def toys() -> tuple[Kinds, type]:
    """A registry and the base of its kinds."""
    known: Kinds[Any] = Kinds("toy", "name", UnknownMode)

    class Toy(ABC):
        name: ClassVar[str]

        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            known.add(cls)

        @abstractmethod
        def play(self) -> str: ...

    return known, Toy


def defined_in(module: str, base: type, name: str, qualname: str = "Ball") -> type:
    """A class as if it stood in a module of that name."""
    body = {"name": name, "play": lambda self: name}
    body |= {"__module__": module, "__qualname__": qualname}
    return types.new_class("Ball", (base,), exec_body=lambda space: space.update(body))


def test_a_class_is_known_by_being_defined():
    known, toy = toys()
    ball = defined_in("a", toy, "ball")
    assert dict(known) == {"ball": ball}
    assert known.find("ball") is known["ball"] is ball
    assert len(known) == 1
    assert "doll" not in known


def test_a_base_without_a_name_is_no_kind():
    known, toy = toys()

    class Round(toy):  # type: ignore[misc, valid-type]
        pass

    assert not known
    ball = defined_in("a", Round, "ball")

    class Heir(ball):  # type: ignore[misc, valid-type]
        """Inherits its name."""

    assert dict(known) == {"ball": ball}


def test_a_class_that_lacks_methods_is_refused_with_their_names():
    known, toy = toys()
    with pytest.raises(BadOption, match=r"name: 'ball', but .*Ball lacks the methods play"):

        class Ball(toy):  # type: ignore[misc, valid-type]
            name = "ball"

    assert not known
    with pytest.raises(BadOption, match=r"lacks the methods build"):

        class Empty(Bias):
            kind = "empty"

    assert "empty" not in BIASES


@pytest.mark.parametrize("name", ["", "a ball", "a.ball", 3, "1st"])
def test_a_name_that_no_state_dict_could_hold_is_refused(name):
    known, toy = toys()
    with pytest.raises(BadOption, match="letters, digits"):
        defined_in("a", toy, name)
    assert not known


def test_a_name_that_is_taken_is_refused_with_its_holder():
    known, toy = toys()
    ball = defined_in("a", toy, "ball")
    for module, qualname in (("b", "Ball"), ("a", "Other")):
        with pytest.raises(
            BadOption, match=rf"name: 'ball' of {module}\.{qualname} is taken by a\.Ball; give"
        ):
            defined_in(module, toy, "ball", qualname)
    assert dict(known) == {"ball": ball}
    with pytest.raises(BadOption, match=r"taken by biassurgery\.modes\.massive\.SetMean"):

        class Mine(WriteMode):
            name = "set_mean"

            def write(self, site: bs.Site) -> float:
                return 0.0

    assert MODES["set_mean"] is SetMean


def test_the_same_class_again_replaces():
    known, toy = toys()
    defined_in("a", toy, "ball")
    again = defined_in("a", toy, "ball")
    assert dict(known) == {"ball": again}

    @dataclass(slots=True)
    class Slim(toy):  # type: ignore[misc, valid-type]
        """A dataclass with slots is made twice; the second is the one that can be used."""

        name: ClassVar[str] = "slim"
        size: int = 3

        def play(self) -> str:
            return "slim"

    assert known["slim"] is Slim
    assert known["slim"](size=4).size == 4


def test_an_unknown_name_says_what_is_known():
    known, toy = toys()
    defined_in("a", toy, "ball")
    for name in ("boll", None, ["ball"]):
        with pytest.raises(UnknownMode, match=r"toy: .* is not known; use one of 'ball', or"):
            known.find(name, ", or another")


@pytest.fixture
def _nothing_loaded():
    kinds.load_extensions.cache_clear()
    yield
    kinds.load_extensions.cache_clear()


@pytest.mark.usefixtures("_nothing_loaded")
def test_extensions_are_loaded_when_a_name_is_not_known(monkeypatch):
    known, toy = toys()
    ball = defined_in("a", toy, "ball")
    loads: list[str] = []

    def good() -> None:
        loads.append("good")
        defined_in("b", toy, "doll")

    def bad() -> None:
        raise SyntaxError("of another package")

    points = [FakeEntryPoint(bad), FakeEntryPoint(good)]
    monkeypatch.setattr(kinds, "entry_points", lambda group: points)
    assert known.find("ball") is ball
    assert known.defined() == {"ball": ball}
    assert loads == []
    with pytest.warns(UserWarning, match=r"fake = fake\.module .*SyntaxError.*not known"):
        assert known.find("doll").__module__ == "b"
    with pytest.raises(UnknownMode, match="'ball', 'doll'"):
        known.find("train")
    assert loads == ["good"]


def test_bases_of_ours_are_no_kinds():
    assert all(base not in MODES.values() for base in (Mode, SiteMode, WriteMode))
    assert all(mode.name == name for name, mode in MODES.items())
    assert all(bias.kind == name for name, bias in BIASES.items())
    assert all(issubclass(bias, nn.Module) for bias in BIASES.values())


def test_a_mode_of_another_module_is_asked_for_by_name():
    @dataclass(frozen=True)
    class Shrink(WriteMode):
        """Massive activations become a part of their means."""

        name: ClassVar[str] = "shrink_in_test_kinds"
        by: float = 0.5

        def write(self, site: bs.Site) -> float:
            return site.mean * self.by

    assert bs.modes.resolve_mode("shrink_in_test_kinds", {"by": 0.25}) == Shrink(0.25)
    with pytest.raises(BadOption, match="no 'value'"):
        bs.modes.resolve_mode("shrink_in_test_kinds", {"value": 0.25})
    assert not hasattr(bs.modes, "Shrink")


def test_fields_of_a_mode_with_a_default_that_is_made_or_that_are_not_options():
    @dataclass(frozen=True)
    class Scale(WriteMode):
        """Massive activations times a product."""

        name: ClassVar[str] = "scale_in_test_kinds"
        factors: tuple[float, ...] = field(default_factory=lambda: (0.5, 0.5))
        product: float = field(init=False, default=0.25)

        def write(self, site: bs.Site) -> float:
            return site.mean * self.product

    mode = bs.modes.resolve_mode("scale_in_test_kinds", {})
    assert mode == Scale((0.5, 0.5))
    assert Scale.from_saved(mode.options(), {}) == mode
    with pytest.raises(BadOption, match=r"no 'product'; it takes \['factors'\]"):
        bs.modes.resolve_mode("scale_in_test_kinds", {"product": 0.5})


def test_a_mode_whose_class_is_defined_again_is_the_same_patch():
    """A notebook's cell that is run twice while its mode is on a model."""
    model, batch = planted("llama"), tokens(rows=2, length=12)
    sites = bs.calibrate(model, batch)

    def cell() -> type[WriteMode]:
        @dataclass(frozen=True)
        class SetTwice(WriteMode):
            name: ClassVar[str] = "set_twice"
            factor: float = 2.0

            def write(self, site):
                return self.factor * site.mean

        return SetTwice

    with untouched(model, batch):
        bs.patch_model(model, cell()(), sites=sites)
        again = cell()
        with untouched(model, batch):
            for mode in ("set_twice", again()):
                with pytest.raises(bs.AlreadyPatched, match="set_twice"):
                    bs.patch_model(model, mode, sites=sites)
            with pytest.raises(bs.errors.NotPatched):
                bs.unpatch_model(model, again(3.0))
        bs.patch_model(model, again(3.0), sites=sites)
        bs.unpatch_model(model, again())
        assert [patch.mode for patch in bs.patches(model)] == [again(3.0)]
        bs.unpatch_model(model, "set_twice")
        assert bs.patches(model) == ()
