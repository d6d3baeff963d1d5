"""`onload="blocks"`: every batch through one block before the weights of the next are needed.

    ordinarily   batch 0: block 0 1 2 ...   batch 1: block 0 1 2 ...
    by blocks    block 0: batch 0 1 2 ...   block 1: batch 0 1 2 ...

Weights that accelerate has offloaded are then read once, however many batches there are, and those
of one block are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, Protocol, TypeAlias

from biassurgery.adapters.devices import block_device
from biassurgery.adapters.libraries import is_fsdp
from biassurgery.adapters.offloaded import hollow
from biassurgery.adapters.registry import Host
from biassurgery.adapters.sharing import needed_ranks
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.measure.block_weights import BlockWeights
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.fingerprint import digest_of
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.spill import InFiles, InMemory, Waiting
from biassurgery.surgery.block import check_block
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.step import Step, Through

Onload: TypeAlias = Literal["blocks"] | None


Beside: TypeAlias = Callable[[int], None]  # called at each block, while its weights are there


class Watch(Protocol):
    """What looks at the blocks while batches go through them, as in an ordinary pass."""

    def places(self) -> Sequence[Place]:
        """The edits that look."""
        raise NotImplementedError  # a protocol

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch is about to go through a block; returns what the model is to read of it."""
        raise NotImplementedError  # a protocol

    def suspend(self) -> Any:
        """What is known of the batch, behind a block: numbers, texts, tensors, and so on."""

    def resume(self, known: Any) -> None:
        """Go on, behind `begin`, from what `suspend` gave."""

    def end(self) -> None:
        """The batch has gone through all blocks."""

    def state(self) -> Any:
        """What is counted, for a checkpoint."""

    def restore(self, state: Any) -> None:
        """Go on from such a state."""


class ByBlocks:
    """One pass block by block.

    Args:
        host: the model.
        spill: a folder for the hidden states between blocks; None: they stay in memory.
        checkpoint: the file of the pass; None: there is none.

    Raises:
        UnsupportedModel: its blocks cannot be run one at a time.
        BadOption: a checkpoint without a folder for the hidden states.
    """

    def __init__(self, host: Host, spill: str | Path | None, checkpoint: str | Path | None) -> None:
        _check_one_at_a_time(host)
        if checkpoint is not None and spill is None:
            raise BadOption(
                "checkpoint: with onload='blocks' the hidden states between blocks have to outlive"
                " the process as well; give spill=, a folder with room for them three times over."
            )
        self.host = host
        self.spill = spill
        self.checkpoint = checkpoint

    def read(
        self,
        watch: Watch,
        batches: Iterable[dict[str, Any]],
        name: str,
        progress: bool | None,
        given: Any = None,
        beside: Beside | None = None,
        **options: Any,
    ) -> None:
        """Take all batches through all blocks.

        Args:
            watch: what looks at the blocks.
            batches: checked ones; all are kept, for each block reads them again.
            name: of the pass.
            progress: see `with_bar`.
            given: what the batches come from.
            beside: what goes through each block behind the batches. A checkpoint holds nothing
                of it: in a pass that goes on, it begins with the first block.
            **options: what else a checkpoint has to agree with.

        Raises:
            UnsupportedModel: blocks hand on more than the residual stream.
            FileError: `spill` or the checkpoint cannot be used.
        """
        data = list(batches)
        host = self.host
        name = f"{name}, block by block"
        counted = _Counted(watch)
        if self.checkpoint is not None:
            options |= {"data": _digest(data)}
        layers = checkpointed(
            range(len(host.blocks)), self.checkpoint, name, host, counted, batches=given, **options
        )
        weights = BlockWeights.of(host)
        with hollow(host.root):
            places = watch.places()
        carried = _Carried(weights, beside)
        with self._waiting(counted.folder) as waiting, reading(host.model), weights.around():
            for layer in with_bar(layers, name, progress, len(host.blocks), "block"):
                waiting.forget_but(layer - 1, counted.written_before(layer))
                carried.up_to(layer)
                with carried.at(layer), attached(self._here(layer, places, counted)):
                    self._through(layer, data, counted, waiting)
            carried.up_to(len(host.blocks))
            last = len(host.blocks) - 1
            waiting.forget_but(last)
            for index, batch in enumerate(data):
                watch.begin(batch)
                watch.resume(waiting.get(last, index).known)
                watch.end()

    def sweep(self, beside: Beside) -> None:
        """Take what needs no data through all blocks."""
        weights = BlockWeights.of(self.host)
        with reading(self.host.model), weights.around():
            _Carried(weights, beside).up_to(len(self.host.blocks))

    def _here(self, layer: int, places: Sequence[Place], counted: _Counted) -> list[Place]:
        """The edits that look while one block runs, and those that let it run alone."""
        looking = [place for place in places if place.layer in (None, layer)]
        return [*looking, *counted.step.places(self.host.blocks)]

    @contextmanager
    def _waiting(self, folder: str) -> Iterator[InMemory | InFiles]:
        """Where batches wait; files stay where a checkpoint needs them, in a folder of its own."""
        if self.spill is None:
            yield InMemory()
            return
        name = None if self.checkpoint is None else f"{Path(self.checkpoint).name}-{folder}"
        waiting = InFiles(self.spill, name)
        try:
            yield waiting
        finally:
            if name is None:
                waiting.remove()

    def _through(
        self, layer: int, data: list[dict[str, Any]], counted: _Counted, waiting: InMemory | InFiles
    ) -> None:
        """All batches through one block."""
        host = self.host
        watch, step = counted.watch, counted.step
        is_last = layer == len(host.blocks) - 1
        device = block_device(host.blocks[layer])
        for index, batch in enumerate(data):
            read = watch.begin(batch)
            kept = None
            if layer:
                before = waiting.get(layer - 1, index)
                watch.resume(before.known)
                assert before.hidden is not None  # only behind the last block nothing is kept
                kept = before.hidden.to(device)
            step.begin(layer, kept, is_first=index == 0, is_last=is_last)
            with suppress(Through):
                host.adapter.run(host.model, read)
            hidden = step.take()
            waiting.put(layer, index, Waiting(None if is_last else hidden.cpu(), watch.suspend()))


class _Carried:
    """What goes beside the batches, if anything, and how far it has come."""

    def __init__(self, weights: BlockWeights, beside: Beside | None) -> None:
        self.weights = weights
        self.beside = beside
        self.done = 0

    def up_to(self, layer: int) -> None:
        """Bring it before a block, where a pass that goes on has left out some."""
        if self.beside is not None:
            for earlier in range(self.done, layer):
                with self.at(earlier):
                    pass

    @contextmanager
    def at(self, layer: int) -> Iterator[None]:
        """Within the block the weights of one block are there; at its end it goes through."""
        with self.weights.at(layer, with_head=self.beside is not None):
            yield
            if self.beside is not None:
                self.beside(layer)
            self.done = layer + 1


class _Counted:
    """What a checkpoint holds of a pass by blocks: what is counted, and the forms of outputs.

    And `folder`, the end of the name of that in which hidden states wait. It is drawn anew for
    every pass, so that no other rank, nor a checkpoint of the same name elsewhere, uses it.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.step = Step()
        self.folder = token_hex(4)
        self._asked = self._written = -1

    def state(self) -> Any:
        self._asked = self.step.layer
        counted = self.watch.state()
        return {"counted": counted, "forms": self.step.forms, "folder": self.folder}

    def restore(self, state: Any) -> None:
        self.watch.restore(state["counted"])
        self.step.forms = state["forms"]
        self.folder = state["folder"]

    def written_before(self, layer: int) -> int:
        """The latest block that the file holds, when the turn of this one comes.

        Who is asked for the state writes it before the next block's turn.
        """
        if self._asked == layer - 1:
            self._written = self._asked
        return self._written


def _check_one_at_a_time(host: Host) -> None:
    """Refuse models of which it is known that one block cannot be run without the others."""
    kind = type(host.model).__name__
    if needed_ranks(host.root) or any(map(is_fsdp, host.root.modules())):
        raise UnsupportedModel(
            f"onload: {kind} is shared by several ranks, which run it together; load it on one"
            " rank, or leave onload= out."
        )
    if len(set(host.blocks)) < len(host.blocks):
        raise UnsupportedModel(
            f"onload: some of the blocks of {kind} are one and the same module, so that they"
            " cannot be run one at a time; leave onload= out."
        )
    if host.adapter.only_with_images(host.model):
        raise UnsupportedModel(
            f"onload: {kind} passes over blocks where there is no image, so that they cannot be"
            " run one at a time; leave onload= out."
        )
    for layer, block in enumerate(host.blocks):
        check_block(block, layer)


def by_blocks(
    host: Host, onload: Onload, spill: str | Path | None, checkpoint: str | Path | None = None
) -> ByBlocks | None:
    """The pass that a user asked for; None: an ordinary one.

    Raises:
        BadOption: an unknown `onload`, or a folder without it.
        UnsupportedModel: the blocks cannot be run one at a time.
    """
    if onload is None:
        if spill is not None:
            raise BadOption(
                f"spill: {spill} is for hidden states that wait between blocks; pass"
                " onload='blocks' too, or leave it out."
            )
        return None
    if onload != "blocks":
        raise BadOption(f"onload: {onload!r}; use 'blocks', or None for an ordinary pass.")
    return ByBlocks(host, spill, checkpoint)


def _digest(data: Sequence[Mapping[str, Any]]) -> str:
    digest = b""
    for batch in data:
        digest = digest_of(batch, digest)
    return digest.hex()
