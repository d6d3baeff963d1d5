"""Values that may turn out to be massive, told apart while the data are still being read.

Which values of a channel are massive is known at the end, when its gate is (`Sites`). Positions and
attention are read on the way. So both keep what they count under the key that the value has in the
`Tally`, and the end decides which keys count: one definition for all that is reported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from biassurgery.measure.massive import MassiveActivations, floor_of
from biassurgery.measure.statistic import BlockOutput

# Fractions of the definition's threshold: a channel that comes near it is looked at, and so is one
# that has met it before; there, values down to the second.
_NEAR = 4.0
_FAR = 16.0


class Found(NamedTuple):
    """Candidates in one block output, (N,) each, on the CPU: where they are, and their keys."""

    row: Tensor
    token: Tensor
    key: Tensor


class Candidates:
    """Finds the candidates in what blocks return.

    Args:
        massive: the statistic that the gates will follow from.
    """

    def __init__(self, massive: MassiveActivations) -> None:
        self.massive = massive
        self._seen: tuple[BlockOutput, Found] | None = None
        self._met: dict[int, Tensor] | None = None

    def __add__(self, other: Candidates) -> Candidates:
        """Those of both data sets."""
        massive = self.massive + other.massive
        assert isinstance(massive, MassiveActivations)
        return Candidates(massive)

    def of(self, output: BlockOutput) -> Found:
        """The candidates in a block output; worked out once, whoever asks."""
        if self._seen is None or self._seen[0] is not output:
            self._seen = output, self._find(output)
        return self._seen[1]

    def _find(self, output: BlockOutput) -> Found:
        threshold = output.threshold[:, None]
        is_near = (output.peak > threshold / _NEAR).any(0)
        is_near |= self._channels(output)
        channels = is_near.nonzero()[:, 0]
        least = torch.maximum(floor_of(output), output.threshold / _FAR)
        columns = output.magnitude[..., channels].float()
        row, token, column = (columns > least[:, None, None]).nonzero(as_tuple=True)
        channel = channels[column]
        key = self.massive.key(
            output.layer,
            channel.cpu(),
            output.roles[row, token].cpu(),
            output.hidden[row, token, channel].double().cpu(),
        )
        return Found(row.cpu(), token.cpu(), key)

    def _channels(self, output: BlockOutput) -> Tensor:
        """(D,) bool: the channels of a layer that have met the definition in earlier batches."""
        if self._met is None:
            self._met = self._of_tally()
        meets, _ = output.massive
        before = self._met.get(output.layer)
        now = self._nothing() if before is None else before
        self._met[output.layer] = now.index_fill(0, meets.to(now.device), True)
        return now.to(output.hidden.device)

    def _of_tally(self) -> dict[int, Tensor]:
        """Those of the batches that were counted before this object looked at any."""
        met: dict[int, Tensor] = {}
        tally = self.massive.totals
        for layer, channel in tally.channels_with_a_hit(len(self.massive.host.roles)):
            met.setdefault(layer, self._nothing())[channel] = True
        return met

    def _nothing(self) -> Tensor:
        return torch.zeros(self.massive.host.width, dtype=torch.bool, device="cpu")
