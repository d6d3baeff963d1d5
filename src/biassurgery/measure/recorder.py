"""The observers that `record` puts on a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from biassurgery.measure.observe import Observer
from biassurgery.measure.quantities import AttentionQuantity, BlockQuantity
from biassurgery.measure.recorded import Keeper
from biassurgery.measure.seen import SeenAttention
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import Attention, AttentionEdit
from biassurgery.surgery.call import Call
from biassurgery.surgery.model import ModelEdit
from biassurgery.surgery.threads import this_thread


class BlockRecorder(Observer):
    """Records one quantity at one end of a block."""

    def __init__(self, layer: int, layout: str, quantity: BlockQuantity, keeper: Keeper) -> None:
        super().__init__(layer, layout, self._keep, quantity.at)
        self.quantity = quantity
        self.keeper = keeper

    def _keep(self, layer: int, hidden: Tensor) -> None:
        self.keeper.forward()
        self.keeper.keep(layer, self.quantity, self.quantity.of(hidden))


class AttentionRecorder(AttentionEdit):
    """Records quantities of one attention and changes nothing.

    Args:
        layer: its index.
        attention: what the adapter says of it.
        quantities: what to record.
        keeper: where to.

    Attributes:
        seen: what is still to be finished of the forward at hand, by thread.
    """

    child = "recorder"
    several = True
    reads_cache = True

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
        self.seen: dict[int, SeenAttention] = {}
        self.reads_input = bool(self.of_module)
        if self.reads_input:
            self.route.check_input()

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        sinks = self.keeper.forward().sinks
        assert sinks is not None  # for an attention is recorded
        seen = SeenAttention(call, columns, out, lse, sinks, not self.keeper.detach)
        self._keep(self.of_heads, seen)
        if self.of_module:
            self.seen[this_thread()] = seen

    def see_output(self, attention_input: Tensor | None, output: Tensor) -> None:
        seen = self.seen.get(this_thread())
        if seen is None:
            return
        assert attention_input is not None  # for this edit reads it
        seen.attention_input = attention_input
        if self.module_returns:
            self.finish(self.layer, output)

    def finish(self, layer: int, output: Tensor) -> None:
        """Take what the attention gives to the residual stream, (B, T, D)."""
        seen = self.seen.pop(this_thread(), None)
        if seen is not None:
            seen.output = output
            self._keep(self.of_module, seen)

    def _keep(self, quantities: list[AttentionQuantity], seen: SeenAttention) -> None:
        for quantity in quantities:
            self.keeper.keep(self.layer, quantity, quantity.of(seen))


class ForwardWatch(ModelEdit):
    """Tells when a forward begins, on a model and on its body without the head.

    Either may be called, and one runs inside the other.

    Args:
        begin: called with the arguments by name.
        running: shared by the watches of one model: for each thread, how many of them are inside
            their forward.
    """

    def __init__(
        self, begin: Callable[[dict[str, Any]], None], running: defaultdict[int, int]
    ) -> None:
        super().__init__()
        self.begin = begin
        self.running = running

    def enter(self, arguments: dict[str, Any]) -> None:
        thread = this_thread()
        if not self.running[thread]:
            self.begin(arguments)
        self.running[thread] += 1

    def leave(self) -> None:
        self.running[this_thread()] -= 1
