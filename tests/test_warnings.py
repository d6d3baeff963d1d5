"""Every warning points at the line of who called the library, however deep the call has come."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

import biassurgery as bs
from biassurgery.errors import warn
from tests.checkpoints import checkpoint
from tests.models import planted, tokens


def line_here() -> int:
    """The line of this file that calls it."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_all_go_through_one_function() -> None:
    source = Path(bs.__file__).parent
    using = {
        file.relative_to(source).as_posix()
        for file in source.rglob("*.py")
        if re.search(r"warnings\.warn(_explicit)?\(", file.read_text())
    }
    assert using == {"errors.py"}


def test_the_line_of_a_plain_call() -> None:
    with pytest.warns(UserWarning, match="^so it is$") as told:
        warn("so it is")
    assert [(w.filename, w.lineno) for w in told] == [(__file__, line_here() - 1)]


def test_once_a_line() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("so it is, once")
        warn("so it is, once")
    assert len(told) == 2


def test_the_line_of_verbs(tmp_path: Path) -> None:
    model = planted("llama")
    ids = tokens()
    varying = ids[:, 2:]
    sites = bs.calibrate(model, ids)
    one_of_two = bs.Sites(sites, origin=sites.origin)
    calls = {
        "less than 9.* apart": lambda: bs.calibrate(model, ids),
        "begin with token 0 already": lambda: bs.perplexity(model, ids, start=0),
        "is not a constant": lambda: bs.patch_model(
            model, "transplant", key_values=bs.calibrate_key_values(planted("llama"), varying)
        ),
        "begin with token": lambda: bs.compare(
            planted("llama"),
            lambda m, start: bs.perplexity(m, ids, start=start),
            [None],
            sites=one_of_two,
            start=0,
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biassurgery.measure.calibrate.NARROW", 9e9)
        for said, call in calls.items():
            with pytest.warns(UserWarning, match=said) as told:
                call()
            places = {(warning.filename, warning.lineno) for warning in told}
            assert {file for file, _ in places} == {__file__}, said
            first = inspect.getsourcelines(call)[1]
            assert all(first <= line < first + 9 for _, line in places), said


def test_the_line_of_a_with_block(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, bos=True)
    with pytest.warns(UserWarning, match="none were given") as told, bs.patched(model, "set_mean"):
        line = line_here() - 1
    assert {(warning.filename, warning.lineno) for warning in told} == {(__file__, line)}


def test_the_line_that_runs_a_model() -> None:
    """Where the library is called from within a forward: torch's frames are nobody's line."""
    model = planted("llama")
    # As an edit of this library stands within a forward.
    scope = {"warn": warn, "__name__": "biassurgery.within"}
    exec("def say(*_): warn('within')", scope)
    model.model.register_forward_pre_hook(scope["say"])
    with pytest.warns(UserWarning, match="within") as told:
        model(tokens())
    assert [(w.filename, w.lineno) for w in told] == [(__file__, line_here() - 1)]
