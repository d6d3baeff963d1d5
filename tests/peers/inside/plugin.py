"""A pytest plugin that patches every model of a library that a test makes.

Where that is, `hooks.py` beside it knows for each library. A model without weights is not patched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import biassurgery as bs

from . import hooks

VARIANT = os.environ["PEERS_VARIANT"]
RESULTS = Path(os.environ["PEERS_RESULTS"])
WORSE = ("passed", "skipped", "failed")
OUT_OF_REACH = 1e30


class Results:
    """What became of each test, its subtests included (the worst counts); which patched a model."""

    outcomes: ClassVar[dict[str, tuple[str, str]]] = {}
    patched: ClassVar[set[str]] = set()
    running = ""


def patch(model: Any) -> None:
    """Put the variant on a model, once; parameters that it adds are the same for every model."""
    if VARIANT == "unpatched" or any(p.device.type == "meta" for p in model.parameters()):
        return
    Results.patched.add(Results.running)
    if not bs.patches(model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _put(model)


def _put(model: Any) -> None:
    if VARIANT == "instrument":
        bs.patch_model(model, "instrument")
    elif VARIANT == "zero_effect":
        bs.patch_model(model, "attention_bias", kind="kv", init="zero_effect")
    else:
        role = hooks.role_of(model)
        site = bs.Site(layer=0, channel=0, role=role, mean=1.0, gate=OUT_OF_REACH)
        bs.patch_model(model, "set_mean", sites=bs.Sites([site]), layers="all")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    hooks.install(patch)


def pytest_runtest_setup(item: pytest.Item) -> None:
    Results.running = _name(item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _name(report.nodeid)
    outcome, why = Results.outcomes.get(name, ("passed", ""))
    if WORSE.index(report.outcome) > WORSE.index(outcome):
        Results.outcomes[name] = (report.outcome, _last_line(report))
    else:
        Results.outcomes.setdefault(name, (outcome, why))


def _name(nodeid: str) -> str:
    """The test without its file's folder and its class."""
    path, _, test = nodeid.partition("::")
    return f"{Path(path).stem}::{test.rpartition('::')[2]}"


def _last_line(report: pytest.TestReport) -> str:
    """The error itself, of all that a report says."""
    lines = str(report.longrepr).splitlines()
    errors = [line for line in lines if line.startswith("E  ")]
    return (errors or lines or [""])[0].removeprefix("E  ").strip()


def pytest_sessionfinish() -> None:
    RESULTS.write_text(
        json.dumps(
            {
                name: {"outcome": outcome, "why": why, "patched": name in Results.patched}
                for name, (outcome, why) in Results.outcomes.items()
            }
        )
    )
