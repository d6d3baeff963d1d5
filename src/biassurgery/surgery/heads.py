"""Tensor parallelism: each rank computes its share of an attention's heads.

What an edit is given and what it gives is of all heads, so that a bias has the same parameters and
a finding the same numbers on any number of ranks. This file takes one to the other. Both ways are
`DTensor`s for a moment, for the sake of their backward: the gradient of what all ranks hold alike
is then whole, and the same, on each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.columns import Columns
from biassurgery.surgery.call import Call

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class HeadShare:
    """How the heads of one attention lie on the ranks: rank r has the r-th of equal shares.

    Attributes:
        mesh: of the ranks, one-dimensional.
        heads: query heads of all ranks.
        kv_heads: key-value heads of all ranks.
    """

    mesh: DeviceMesh
    heads: int
    kv_heads: int

    def is_share(self, call: Call) -> bool:
        """Whether a call has this rank's heads; else it has all, as where ranks gather them.

        Raises:
            UnsupportedModel: neither.
        """
        found = (call.q.shape[1], call.k.shape[1])
        expected = (self.heads, self.kv_heads)
        if found == expected:
            return False
        ranks = self.mesh.size()
        if (found[0] * ranks, found[1] * ranks) != expected:
            raise UnsupportedModel(
                f"model: an attention of {expected[0]} query heads and {expected[1]} key-value"
                f" heads has {found[0]} and {found[1]} on one of {ranks} tensor-parallel ranks;"
                " unpatch it, and load it on a number of ranks that divides both."
            )
        return True

    def whole(self, call: Call) -> Call:
        """The call with the heads of all ranks."""
        mask = call.mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] == call.q.shape[1]:
            mask = self.gathered(mask)  # else it is the same for all heads
        return call._replace(
            q=self.gathered(call.q),
            k=self.gathered(call.k),
            v=self.gathered(call.v),
            mask=mask,
            sinks=None if call.sinks is None else self.gathered(call.sinks, 0),
            weights=None,  # the host's are those of its own heads
        )

    def gathered(self, x: Tensor, axis: int = 1) -> Tensor:
        """This rank's heads at `axis` -> those of all ranks."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(x.contiguous(), self.mesh, [Shard(axis)]).full_tensor()

    def own(self, x: Tensor, axis: int = 1) -> Tensor:
        """This rank's part of what all ranks hold alike: all heads at `axis`, or one for any."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        alike = DTensor.from_local(x, self.mesh, [Replicate()])
        if x.shape[axis] == 1:  # the heads of every rank use it: their gradients add up
            return alike.to_local(grad_placements=[Partial()])
        return alike.redistribute(placements=[Shard(axis % x.dim())]).to_local()

    def own_columns(self, columns: Columns) -> Columns:
        """This rank's part of columns that have all heads."""
        logit, key, value = columns
        return Columns(
            self.own(logit[(None,) * (3 - logit.dim())], -3),
            None if key is None else self.own(key, 0),
            None if value is None else self.own(value, 0),
        )
