"""A pytest plugin that patches every model of transformers that a test makes.

A model is patched where its user gets it: built from a config, or from `from_pretrained`; the
outermost one only, and not while it has no weights.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

import biassurgery as bs

VARIANT = os.environ["PEERS_VARIANT"]
RESULTS = Path(os.environ["PEERS_RESULTS"])
WORSE = ("passed", "skipped", "failed")
OUT_OF_REACH = 1e30


def patch(model: Any) -> Any:
    """Put the variant on a model, once; parameters that it adds are the same for every model."""
    if VARIANT == "unpatched" or bs.patches(model):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return put(model)


def put(model: Any) -> Any:
    if VARIANT == "instrument":
        return bs.patch_model(model, "instrument")
    if VARIANT == "zero_effect":
        return bs.patch_model(model, "attention_bias", kind="kv", init="zero_effect")
    site = bs.Site(layer=0, channel=0, role=role_of(model), mean=1.0, gate=OUT_OF_REACH)
    return bs.patch_model(model, "set_mean", sites=bs.Sites([site]), layers="all")


def role_of(model: Any) -> str:
    return "cls" if model.main_input_name == "pixel_values" else "start"


class Outermost:
    """How many constructors of models run inside each other."""

    depth = 0


def patched_when_built(build: Any) -> Any:
    @functools.wraps(build)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        Outermost.depth += 1
        try:
            build(self, *args, **kwargs)
        finally:
            Outermost.depth -= 1
        on_meta = any(p.device.type == "meta" for p in self.parameters())
        if Outermost.depth == 0 and not on_meta:
            patch(self)

    return wrapper


def wrap_class(cls: Any) -> None:
    cls.__init__ = patched_when_built(cls.__init__)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if VARIANT == "unpatched":
        return
    from .testers import FAMILIES, Tester

    for cls in Tester(FAMILIES[os.environ["PEERS_FAMILY"]]).classes():
        wrap_class(cls)
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        Outermost.depth += 1
        try:
            loaded = load(cls, *args, **kwargs)
        finally:
            Outermost.depth -= 1
        if isinstance(loaded, tuple):  # output_loading_info=True
            patch(loaded[0])
        else:
            patch(loaded)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


class Results:
    """What became of each test, its subtests included: the worst counts."""

    outcomes: ClassVar[dict[str, tuple[str, str]]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    outcome, why = Results.outcomes.get(name, ("passed", ""))
    if WORSE.index(report.outcome) > WORSE.index(outcome):
        Results.outcomes[name] = (report.outcome, _last_line(report))
    else:
        Results.outcomes.setdefault(name, (outcome, why))


def _last_line(report: pytest.TestReport) -> str:
    """The error itself, of all that a report says."""
    lines = str(report.longrepr).splitlines()
    errors = [line for line in lines if line.startswith("E  ")]
    return (errors or lines or [""])[0].removeprefix("E  ").strip()


def pytest_sessionfinish() -> None:
    RESULTS.write_text(json.dumps(Results.outcomes))
