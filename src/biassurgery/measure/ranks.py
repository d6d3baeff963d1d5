"""Adding up what the ranks of `torch.distributed` have measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from biassurgery.errors import SurgeryError

Finding = TypeVar("Finding")


def over_ranks(measure: Callable[[], Finding]) -> Finding:
    """What `measure()` returns, added up over all ranks where `torch.distributed` runs.

    An error of one rank is raised on all, so that none waits for it.
    """
    try:
        outcome: Finding | SurgeryError = measure()
    except SurgeryError as error:
        outcome = error
    outcomes: list[Any] = [outcome]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        outcomes *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, outcome)
    for outcome in outcomes:
        if isinstance(outcome, SurgeryError):
            raise outcome
    total = outcomes[0]
    for outcome in outcomes[1:]:
        total = total + outcome
    return total
