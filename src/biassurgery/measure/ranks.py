"""Adding up what the ranks of `torch.distributed` have found."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from biassurgery.errors import SurgeryError

Found = TypeVar("Found")


def gather(found: Found | SurgeryError) -> Found:
    """The sum over all ranks where `torch.distributed` runs; an error of one rank is raised on all,
    so that none waits for it.
    """
    everyone: list[Any] = [found]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, found)
    for each in everyone:
        if isinstance(each, SurgeryError):
            raise each
    total = everyone[0]
    for each in everyone[1:]:
        total = total + each
    return total
