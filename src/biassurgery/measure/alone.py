"""Every token as the first and only one of a sequence: does the place make its value, or the token?

Source: Sun, Canziani, LeCun, Zhu 2026, table 2. The first position sees nothing but itself, so that
a sequence of one token says what it is in front of any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biassurgery.adapters.layers import layer_indices
from biassurgery.adapters.registry import find_host
from biassurgery.data.batches import as_batches
from biassurgery.errors import BadOption, NonFiniteActivation
from biassurgery.measure.observe import observers
from biassurgery.measure.reading import reading, with_bar
from biassurgery.surgery.edit import attached

_TOKENS = 1024  # a batch


class _Enough(Exception):
    """The block has run; what comes behind it is not needed."""


def values_alone(
    model: nn.Module,
    ids: Tensor,
    layer: int,
    channel: int,
    *,
    batch_size: int = _TOKENS,
    progress: bool | None = None,
) -> Tensor:
    """The value of one channel of a block's output, for each token alone in a sequence.

    Nothing behind that block runs, the head neither. Compare with the median of ordinary sequences:
    where a sequence is one massive token, its own median is larger, and the ratio small.

    Args:
        model: a text model of a supported architecture.
        ids: (N,) int64 token ids.
        layer, channel: 0-based.
        batch_size: tokens a forward.
        progress: whether a bar is shown; None: on a terminal, and elsewhere a line now and then.

    Returns:
        (N,) float32 on the CPU.

    Raises:
        BadBatch, BadOption, LayerOutOfRange: ids, a channel or a layer that there are not.
        NonFiniteActivation: a value is NaN or infinite.
    """
    host = find_host(model, "text")
    (at,) = layer_indices(host, [layer])
    if not 0 <= channel < host.width:
        raise BadOption(f"channel: {channel!r}; give one from 0 to {host.width - 1}.")
    found: list[Tensor] = []

    def see(_: int, hidden: Tensor) -> None:
        found.append(hidden[:, 0, channel].float().cpu())
        raise _Enough

    rows = ids.view(-1, 1).split(batch_size)
    batches = with_bar(as_batches(host, rows), "tokens alone", progress, len(rows))
    with reading(host.model), attached(observers(host, see, layers=[at])):
        for batch in batches:
            try:
                host.adapter.run(host.model, batch)
            except _Enough:
                continue
    values = torch.cat(found)
    if not values.isfinite().all():
        raise NonFiniteActivation(
            f"model: {int((~values.isfinite()).sum())} tokens alone have NaN or infinity in channel"
            f" {channel} of block {at}; compute in float32."
        )
    return values
