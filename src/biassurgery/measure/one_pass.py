"""One pass over data in which every block's output is shown to statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.layers import fit_to
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.data.start import chosen_start
from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel, warn
from biassurgery.measure.by_blocks import ByBlocks
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.observe import check_ran, observers
from biassurgery.measure.progress import count_of
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.statistic import (
    BlockOutput,
    Statistic,
    check_counted,
    check_states,
    check_suspendable,
)
from biassurgery.measure.together import in_step
from biassurgery.ops.median import median_magnitude
from biassurgery.surgery.edit import Place, attached


class Pass:
    """Reads data once.

    Args:
        host: the model.
        min_magnitude, min_ratio: a value is massive if its magnitude exceeds both `min_magnitude`
            and `min_ratio` times the median magnitude of its sequence's hidden state.
        statistics: what is counted.

    Attributes:
        left_out: the blocks that do not run on such data; None: nothing has been read.
    """

    def __init__(
        self,
        host: Host,
        min_magnitude: float,
        min_ratio: float,
        statistics: Sequence[Statistic],
    ) -> None:
        self.host = host
        self.min_magnitude = min_magnitude
        self.min_ratio = min_ratio
        self.statistics = statistics
        self.left_out: list[int] | None = None

    def state(self) -> dict[str, Any]:
        """What the statistics have counted, by their names, and which blocks did not run."""
        counted = {statistic.name: statistic.state() for statistic in self.statistics}
        return {"statistics": counted, "left_out": self.left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self.left_out = state["left_out"]
        for statistic in self.statistics:
            statistic.restore(state["statistics"][statistic.name])

    def read(
        self,
        batches: Iterable[dict[str, Any]],
        name: str,
        progress: bool | None,
        checkpoint: str | Path | None = None,
        given: Any = None,
        start: int | None = None,
        blocks: ByBlocks | None = None,
    ) -> None:
        """Run the model on every batch.

        Args:
            batches: checked ones, from `as_batches`.
            name: of the pass.
            progress: show a progress bar; None: see `with_bar`.
            checkpoint: see `checkpointed`; None: there is none.
            given: what the checked batches come from.
            start: the token that was put in front of their sequences.
            blocks: takes all batches through one block before the next; None: all blocks read one
                batch before the next.

        Raises:
            NonFiniteActivation, UnsupportedModel: see their messages.
            BadOption, FileError: `checkpoint` cannot be used.
        """
        options = self._options(start)
        if checkpoint is not None:
            check_states(self.statistics)
        if blocks is not None:
            check_suspendable(self.statistics)
            blocks.read(self, batches, name, progress, given, **options)
            self.left_out = []
            return
        # How many are left of those that a checkpoint holds is not known.
        total = count_of(given) if checkpoint is None else None
        kept = checkpointed(batches, checkpoint, name, self.host, self, batches=given, **options)
        with reading(self.host.model), attached(self.places()):
            for batch in with_bar(in_step(kept, self.host.root), name, progress, total):
                self.begin(batch)
                self.host.adapter.run(self.host.model, batch)
                self.left_out = self._left_out(self.left_out)
                self.end()
                if checkpoint is not None:
                    check_counted(self.statistics)

    def places(self) -> list[Place]:
        """The observers of statistics, and one on every block."""
        places = [place for statistic in self.statistics for place in statistic.places()]
        fit_to(self.host, places)
        return places + observers(self.host, self._see)

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch is about to be read; what the model reads of it."""
        self._batch = batch
        self._roles: Tensor | None = None
        self._finite: dict[int, Tensor] = {}
        for statistic in self.statistics:
            statistic.begin(batch)
        return batch

    def suspend(self) -> list[Any]:
        """What the statistics know of the batch, between two blocks."""
        self._check_finite()
        return [statistic.suspend() for statistic in self.statistics]

    def resume(self, known: Sequence[Any]) -> None:
        """Go on from that, behind `begin`."""
        for statistic, of_it in zip(self.statistics, known, strict=True):
            statistic.resume(of_it)

    def end(self) -> None:
        """Let the statistics count the batch, if all values are finite."""
        self._check_finite()
        for statistic in self.statistics:
            statistic.end()

    def warn_of_left_out(self) -> None:
        """Tell the caller of a verb about blocks that did not run."""
        if self.left_out:
            warn(
                f"model: blocks {self.left_out} attend to images and did not run on text alone;"
                " they are left out.",
            )

    def _options(self, start: int | None) -> dict[str, Any]:
        """What a checkpoint has to agree with."""
        return {
            "min_magnitude": float(self.min_magnitude),
            "min_ratio": float(self.min_ratio),
            "statistics": [getattr(statistic, "name", "") for statistic in self.statistics],
        } | chosen_start(start)

    def _see(self, layer: int, hidden: Tensor) -> None:
        """Take one block output."""
        self._check(layer, hidden)
        roles = self._roles_of(hidden)
        real = roles != PADDING
        magnitude = hidden.abs()
        if not self._all_real:
            magnitude = magnitude.masked_fill(~real.unsqueeze(-1), 0)
        median = median_magnitude(magnitude, None if self._all_real else real)
        threshold = (self.min_ratio * median).clamp(min=self.min_magnitude)
        output = BlockOutput(layer, hidden, magnitude, median, threshold, roles, real)
        self._finite[layer] = output.peak.isfinite().all()
        for statistic in self.statistics:
            statistic.see(output)

    def _check(self, layer: int, hidden: Tensor) -> None:
        """Refuse what has no one residual stream to read."""
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

    def _roles_of(self, hidden: Tensor) -> Tensor:
        """(B, T) the roles of the tokens, worked out once a batch."""
        shape = (hidden.shape[0], hidden.shape[1])
        if self._roles is None or tuple(self._roles.shape) != shape:
            self._roles = self.host.adapter.token_roles(self.host.model, self._batch, shape)
            self._all_real = not bool((self._roles == PADDING).any())
        return self._roles.to(hidden.device)

    def _left_out(self, before: list[int] | None) -> list[int]:
        """The blocks that the batch has passed over, which must be those of all batches before."""
        left_out = check_ran(self.host, self._finite)
        if before not in (None, left_out):
            raise BadBatch(
                f"batches: blocks {sorted({*left_out, *(before or ())})} attend to images, which"
                " some batches have and others have not; give one kind at a time."
            )
        return left_out

    def _check_finite(self) -> None:
        for layer, finite in self._finite.items():
            if not finite:
                raise NonFiniteActivation(
                    f"batches: the output of block {layer} holds NaN or infinity;"
                    f" {what_to_do(self.host)}."
                )
