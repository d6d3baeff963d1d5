"""One pass over data with every block observed, in eval mode, on the model's own devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import Host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import NonFiniteActivation, UnsupportedModel
from biassurgery.findings.sites import Origin
from biassurgery.findings.tally import Tally
from biassurgery.measure.observe import observed
from biassurgery.ops.median import median_magnitude

# values down to this fraction of the definition's threshold are kept, to find the gap below the
# massive ones
_FLOOR = 32.0
_FLOOR_IN_MEDIANS = 8.0  # but none of the ordinary ones


class _Large(NamedTuple):
    """The values above the floor in one block output, (N,) each, on the CPU."""

    layer: int
    channel: Tensor
    role: Tensor
    position: Tensor
    value: Tensor
    hit: Tensor


class Measurement:
    """The tally of one model, fed with block outputs.

    Args:
        host: the model.
        min_magnitude, min_ratio: the definition; a value is massive if its magnitude exceeds both
            `min_magnitude` and `min_ratio` times the median magnitude of its sequence's hidden
            state.
        also: called with (layer, magnitude (B, T, D), real (B, T) or None, median (B,)) for further
            statistics.
    """

    def __init__(
        self,
        host: Host,
        min_magnitude: float,
        min_ratio: float,
        also: Callable[[int, Tensor, Tensor | None, Tensor], None] | None = None,
    ) -> None:
        self.host = host
        self.min_magnitude = min_magnitude
        self.min_ratio = min_ratio
        self.also = also
        self.tally = Tally.empty(len(host.blocks), host.width)
        self.positions = Counter[
            tuple[int, int, int]
        ]()  # (layer, channel, position): values there that met the definition
        self.start_batch({})

    def origin(self, source: str) -> Origin:
        """What the resulting sites were measured on."""
        return Origin(
            self.host.architecture,
            len(self.host.blocks),
            self.host.width,
            self.host.roles,
            self.min_magnitude,
            self.min_ratio,
            source,
        )

    def run(self, batches: Batch | Any, progress: bool) -> Tally:
        """Read all batches once and return the tally."""
        from tqdm.auto import tqdm

        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            eval_mode(self.host.model),
            observed(self.host, self.see),
        ):
            for batch in tqdm(
                as_batches(self.host, batches),
                desc="calibrating",
                unit="batch",
                disable=not progress,
            ):
                self.start_batch(batch)
                self.host.adapter.run(self.host.model, batch)
                self._finish_batch()
        return self.tally

    def start_batch(self, batch: dict[str, Any]) -> None:
        """Forget the batch before; a subclass may take note of the new one."""
        self._batch = batch
        self._roles: Tensor | None = None
        self._large: list[_Large] = []
        self._below: dict[int, Tensor] = {}
        self._medians: dict[int, Tensor] = {}
        self._finite: dict[int, Tensor] = {}

    def see(self, layer: int, hidden: Tensor) -> None:
        """Take one block output; only values above the floor leave the device, all others are
        reduced there.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.host.width:
            raise UnsupportedModel(
                f"model: block {layer} returns a hidden state of shape {tuple(hidden.shape)}, not"
                f" (B, T, {self.host.width}); its architecture has no residual stream that this"
                " library can read."
            )
        if layer in self._finite:
            raise UnsupportedModel(
                f"model: block {layer} ran twice in one forward, so it has no one output; looped"
                " layers cannot be measured."
            )
        roles = self._token_roles(hidden)
        real = None if self._all_real else roles != PADDING
        magnitude = hidden.abs()
        if real is not None:
            magnitude = magnitude.masked_fill(~real.unsqueeze(-1), 0)
        median = median_magnitude(magnitude, real)
        threshold = (self.min_ratio * median).clamp(min=self.min_magnitude)
        floor = torch.minimum(
            threshold, torch.maximum(threshold / _FLOOR, _FLOOR_IN_MEDIANS * median)
        )
        peak = magnitude.amax(1).float()  # (B, D)
        large = (peak > floor[:, None]).any(0)
        channels = large.nonzero()[:, 0]
        below = torch.where(large, 0, peak.amax(0))
        if len(channels):
            below = self.take(layer, hidden, magnitude, roles, channels, threshold, floor, below)
        self._below[layer] = below
        self._medians[layer] = median.double().sum()
        self._finite[layer] = peak.isfinite().all()
        if self.also is not None:
            self.also(layer, magnitude, real, median)

    def take(
        self,
        layer: int,
        hidden: Tensor,
        magnitude: Tensor,
        roles: Tensor,
        channels: Tensor,
        threshold: Tensor,
        floor: Tensor,
        below: Tensor,
    ) -> Tensor:
        """Set the values above the floor aside; returns `below` with the rest of their channels."""
        columns = magnitude[..., channels].float()
        above = columns > floor[:, None, None]
        row, token, column = above.nonzero(as_tuple=True)
        value = hidden[row, token, channels[column]]
        hit = columns[row, token, column] > threshold[row]
        self._large.append(
            _Large(
                layer,
                channels[column].cpu(),
                roles[row, token].cpu(),
                token.cpu(),
                value.double().cpu(),
                hit.cpu(),
            )
        )
        return below.index_copy(0, channels, columns.masked_fill(above, 0).amax((0, 1)))

    def _token_roles(self, hidden: Tensor) -> Tensor:
        shape = (hidden.shape[0], hidden.shape[1])
        if self._roles is None or tuple(self._roles.shape) != shape:
            self._roles = self.host.adapter.token_roles(self.host.model, self._batch, shape)
            self._all_real = not bool((self._roles == PADDING).any())
        return self._roles.to(hidden.device)

    def _finish_batch(self) -> None:
        """Move what was set aside to the table, on the host; a batch with a value that is not
        finite leaves no trace in it.
        """
        tally = self.tally
        layers = range(len(self.host.blocks))
        for layer in layers:
            if layer not in self._finite:
                raise UnsupportedModel(
                    f"model: block {layer} did not run; layers that are skipped at random cannot be"
                    " measured."
                )
            if not self._finite[layer]:
                raise NonFiniteActivation(
                    f"batches: the output of block {layer} holds NaN or infinity; run the model in"
                    " bfloat16 or float32, and look at its inputs and weights."
                )
        if self._large:
            keys = [
                tally.key(each.layer, each.channel, each.role, len(self.host.roles), each.value)
                for each in self._large
            ]
            tally = tally.with_values(
                torch.cat(keys),
                torch.cat([each.value for each in self._large]),
                torch.cat([each.hit for each in self._large]),
            )
            for each in self._large:
                places, counts = torch.stack([each.channel, each.position])[:, each.hit].unique(
                    dim=1, return_counts=True
                )
                self.positions.update(
                    {
                        (each.layer, *place): count
                        for place, count in zip(places.T.tolist(), counts.tolist())
                    }
                )
        assert self._roles is not None  # set by the first block
        real = self._roles != PADDING
        self.tally = tally.with_totals(
            below=torch.stack([self._below[layer].cpu() for layer in layers]),
            medians=torch.stack([self._medians[layer].cpu() for layer in layers]),
            sequences=int(real.any(1).sum()),
            tokens=int(real.sum()),
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
