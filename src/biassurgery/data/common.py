"""What all evaluations share: a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def with_bar(items: Iterable[Any], name: str, progress: bool | None) -> Iterator[Any]:
    """The items behind a progress bar; None: only on a terminal."""
    from tqdm.auto import tqdm

    return iter(
        tqdm(
            items,
            desc=name,
            unit="batch",
            disable=not (sys.stderr.isatty() if progress is None else progress),
        )
    )
