"""The observers that `record` puts on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from biassurgery.measure.observe import Observer
from biassurgery.measure.quantities import AttentionQuantity, BlockQuantity
from biassurgery.measure.recorded import Keeper
from biassurgery.measure.seen import SeenAttention, SinkTokens
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import Attention, AttentionEdit
from biassurgery.surgery.call import Call
from biassurgery.surgery.model import ModelEdit


class BlockRecorder(Observer):
    """Records one quantity at one end of a block."""

    def __init__(self, layer: int, layout: str, quantity: BlockQuantity, keeper: Keeper) -> None:
        super().__init__(layer, layout, self._keep, quantity.at)
        self.quantity = quantity
        self.keeper = keeper

    def _keep(self, layer: int, hidden: Tensor) -> None:
        self.keeper.check_begun()
        self.keeper.keep(layer, self.quantity, self.quantity.of(hidden))


class AttentionRecorder(AttentionEdit):
    """Records quantities of one attention and changes nothing.

    Args:
        layer: its index.
        attention: what the adapter says of it.
        quantities: what to record.
        keeper: where to.

    Attributes:
        sinks: of the forward at hand.
    """

    child = "recorder"
    several = True
    reads_cache = True
    sinks: SinkTokens

    def __init__(
        self,
        layer: int,
        attention: Attention,
        quantities: Sequence[AttentionQuantity],
        keeper: Keeper,
    ) -> None:
        super().__init__()
        self.route = attention.route
        self.layer = layer
        self.of_heads = [quantity for quantity in quantities if quantity.at == "heads"]
        self.of_module = [quantity for quantity in quantities if quantity.at == "module"]
        self.keeper = keeper
        self.module_returns = attention.whole is None  # what goes to the residual stream
        self.seen: SeenAttention | None = None  # until the module has returned
        self.reads_input = bool(self.of_module)
        if self.reads_input:
            self.route.check_input()

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        self.keeper.check_begun()
        seen = SeenAttention(call, columns, out, lse, self.sinks, not self.keeper.detach)
        self._keep(self.of_heads, seen)
        self.seen = seen if self.of_module else None

    def see_output(self, attention_input: Tensor | None, output: Tensor) -> None:
        if self.seen is None:
            return
        assert attention_input is not None  # for this edit reads it
        self.seen.attention_input = attention_input
        if self.module_returns:
            self.finish(self.layer, output)

    def finish(self, layer: int, output: Tensor) -> None:
        """Take what the attention gives to the residual stream, (B, T, D)."""
        if self.seen is not None:
            self.seen.output = output
            self._keep(self.of_module, self.seen)
            self.seen = None

    def _keep(self, quantities: list[AttentionQuantity], seen: SeenAttention) -> None:
        for quantity in quantities:
            self.keeper.keep(self.layer, quantity, quantity.of(seen))


class ForwardWatch(ModelEdit):
    """Tells when a forward begins, on a model and on its body without the head.

    Either may be called, and one runs inside the other.

    Args:
        begin: called with the arguments by name.
        running: shared by the watches of one model: one entry for each that is inside its forward.
    """

    def __init__(self, begin: Callable[[dict[str, Any]], None], running: list[ModelEdit]) -> None:
        super().__init__()
        self.begin = begin
        self.running = running

    def enter(self, arguments: dict[str, Any]) -> None:
        if not self.running:
            self.begin(arguments)
        self.running.append(self)

    def leave(self) -> None:
        self.running.pop()
