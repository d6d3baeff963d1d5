"""Removing what processes that were killed while they wrote a file have left of it."""

from __future__ import annotations

import os
import re
from pathlib import Path


def remove_leftovers(path: Path) -> None:
    """Remove unfinished versions of a file, `name.PID.RANDOM.part`, whose processes run no more.

    Only where the system can tell that.
    """
    if os.name != "posix" or not path.parent.is_dir():
        return
    for part in path.parent.iterdir():
        match = re.fullmatch(rf"{re.escape(path.name)}\.(\d+)\.[0-9a-f]{{8}}\.part", part.name)
        if match and not _runs(int(match[1])):
            part.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # it runs, or is no process of this system
    return True
