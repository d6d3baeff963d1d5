"""That a call is refused: by which error, in which words, with nothing changed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import biassurgery as bs
from tests import models
from tests.models import CHANNEL, LAYER
from tests.state import untouched

IDS = models.tokens(rows=2, length=12)
SITES = bs.Sites(
    [
        bs.Site(LAYER, CHANNEL, "start", 3000.0, gate=700.0),
        bs.Site(LAYER, CHANNEL, "elsewhere", 9000.0, gate=700.0),
    ]
)
Call = Callable[[Any], Any]
FUNCTIONS = (bs.patch_model, bs.unpatch_model, bs.calibrate, bs.load_patch, bs.Sites.load)
ARGUMENTS = {"value", "channels", "positions", "scale", "seed"} | {
    name for f in FUNCTIONS for name in inspect.signature(f).parameters
}


def check(
    model: Any, call: Call, error: type[bs.SurgeryError], pattern: str, batch: Any = IDS
) -> None:
    """That the call is refused by a message that begins with the argument and is not a word."""
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
