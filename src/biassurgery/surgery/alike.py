"""What tensor-parallel ranks must have alike: random numbers, which each would draw for itself.

They compute one model together. A hidden state with noise on it that differs from rank to rank is
no hidden state of any model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def alike(drawn: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """What the first rank of a mesh has drawn, on all of them; it is written over `drawn`.

    Args:
        drawn: of one shape on all ranks, contiguous.
        mesh: one-dimensional; None: there is one rank.
    """
    if mesh is not None:
        group = mesh.get_group()
        torch.distributed.broadcast(drawn, torch.distributed.get_global_rank(group, 0), group)
    return drawn
