"""The windows that are scored, and those that calibrate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.data.packaged import packaged_text, special_prefix

NO_START = "none"
_CALIBRATION, _HELD = 6, 2  # windows


class Data(NamedTuple):
    """Windows (1, T), to calibrate on, to choose a quantile by, and to score."""

    calibration: list[Tensor]
    held: list[Tensor]
    scored: list[Tensor]


def front_of(tokenizer: Any, start: str | None) -> list[int]:
    """The token that goes in front of every window, if any."""
    if start == NO_START:
        return []
    if start is not None:
        return [int(tokenizer.convert_tokens_to_ids(start))]
    prefix = special_prefix(tokenizer)
    if not prefix:
        raise SystemExit("the tokenizer puts no token in front; name one by --start, or none")
    return prefix[:1]


def windows(loaded: Any, options: Any, seed: int) -> Data:
    """Windows that follow each other in the text, and eight by seed of the one to calibrate on.

    Where that is the same text, the eight begin behind what is scored.
    """
    front = front_of(loaded.tokenizer, options.start)
    step = options.length - len(front)

    def cut(ids: list[int], starts: list[int]) -> list[Tensor]:
        rows = [[*front, *ids[i : i + step]] for i in starts]
        if any(len(row) < options.length for row in rows):
            raise SystemExit(f"the text has {len(ids)} tokens: too few for {len(rows)} windows")
        return [torch.tensor([row], device=loaded.model.device) for row in rows]

    def ids_of(text: str) -> list[int]:
        return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]

    text = ids_of(Path(options.text).read_text(encoding="utf-8"))
    scored = cut(text, [step * i for i in range(options.windows)])
    if options.calibration is None:
        source = ids_of(packaged_text("calibration"))
    elif Path(options.calibration).samefile(options.text):
        source = text[step * options.windows :]
    else:
        source = ids_of(Path(options.calibration).read_text(encoding="utf-8"))
    drawn = random.Random(seed).sample(range(len(source) - step), _CALIBRATION + _HELD)
    eight = cut(source, drawn)
    return Data(eight[:_CALIBRATION], eight[_CALIBRATION:], scored)
