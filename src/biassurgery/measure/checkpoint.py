"""A pass over data that goes on where it was killed: `checkpoint=` of every verb that reads once.

The file holds the exact sums of the batches that are counted, in float64 and integers as they are,
and a hash of these batches. Who starts the same pass again reads the data from the start, compares
the hash, runs the model on the rest only, and has the same numbers bit by bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, FileError
from biassurgery.findings.files import (
    CHECKSUM,
    CORRUPT,
    as_path,
    parse_json,
    read_tensors,
    told,
    write_tensors,
)
from biassurgery.findings.leftovers import remove_leftovers
from biassurgery.findings.state import pack, unpack
from biassurgery.measure.fingerprint import digest_of, facts_of
from biassurgery.measure.generators import generator_states, set_generator_states
from biassurgery.measure.going_on import check_counts, check_ranks

FORMAT = 1
_FILE_KEY = "biassurgery_checkpoint"
_SECONDS = 5.0  # between two versions of the file
_SHARE = 0.02  # of the time that writing may take at most, if it is slow
_AGAIN = "delete it to start anew, or name another file"
Item = TypeVar("Item")


class Counted(Protocol):
    """What has been counted in a pass, as long as no batch is half counted."""

    def state(self) -> Any:
        """Numbers, texts, tensors, and tuples, lists and dicts of them."""

    def restore(self, state: Any) -> None:
        """Go on from such a state; tensors come back on the CPU, every mapping as a dict."""


def checkpointed(
    checked: Iterable[Item],
    file: str | Path | None,
    verb: str,
    host: Host,
    counted: Counted,
    *,
    batches: Any,
    **options: Any,
) -> Iterator[Item]:
    """The batches that have not been counted, and a file in which the count is kept.

    A batch counts as soon as the next one is asked for. The file is written behind the first batch,
    then every few seconds, and behind the last one. It stays: the pass that it holds can be had
    again without a forward. Under `torch.distributed` each rank has its own, `file.rank0` and so
    on.

    Random numbers: where the model has drawn from torch's default generators (`noise`, `shuffle`),
    they go on from the state that the killed pass left them in.

    Args:
        checked: all batches, checked, from the first one on.
        file: the checkpoint; None: all batches are yielded, and nothing is kept.
        verb: which pass it is.
        host: the model.
        counted: nothing yet; gets what the file holds.
        batches: what the user gave, to see whether its order comes again.
        **options: what else the numbers depend on, ready for JSON.

    Raises:
        BadOption: a loader that shuffles, something counted that cannot be kept, weights on the
            meta device, or a model that is run together with ranks outside of the group.
        FileError: the file is no checkpoint, damaged, or one of another model, of other options or
            of other batches, which is found where these are read; or ranks that run one model
            together have counted other numbers of batches.
    """
    if file is None:
        return iter(checked)
    _check_order(batches)
    path = _of_this_rank(as_path("checkpoint", file))
    remove_leftovers(path)
    checkpoint = _Checkpoint(path, verb, host, counted, options)
    check_ranks(host.root)
    checkpoint.read()
    check_counts(path, host.root, checkpoint.counted)
    return checkpoint.rest(checked)


class _Checkpoint:
    """One file, and how far its pass has come.

    Attributes:
        counted, written: how many batches are counted, and how many in the file.
        first, last: the hash of the first of them, and of all of them, in hexadecimal.
        generators: the state of the random generators, by device; empty: the model draws none.
    """

    def __init__(
        self, path: Path, verb: str, host: Host, counts: Counted, options: dict[str, Any]
    ) -> None:
        facts = {"pass": verb} | facts_of(host, "checkpoint") | options | {"rank": list(_rank())}
        self.path = path
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))
        self.counts = counts
        self.devices = {parameter.device for parameter in host.root.parameters()}
        self.counted = self.written = 0
        self.first = self.last = ""
        self.generators: dict[str, Tensor] = {}
        self._due = 0.0  # on the clock of time.monotonic()
        self._packed({})  # what cannot be kept is refused before the pass

    def read(self) -> None:
        """Take up what the file holds, if there is one.

        Raises:
            FileError: it is no checkpoint, is damaged, or holds another pass.
        """
        if not self.path.exists():
            return
        try:
            tensors, document = _read_document(self.path)
            different = _differences(document["facts"], self.facts)
            if not different:
                counted, self.first, self.last = document["counted"]
                self.counted = int(counted)
                self.generators = unpack(document["generators"], tensors)
                self.counts.restore(unpack(document["state"], tensors))
                self.written = self.counted
        except (FileError, *CORRUPT) as error:
            raise FileError(
                f"checkpoint: {self.path} is no checkpoint that can be read ({told(error)});"
                f" {_AGAIN}."
            ) from error
        if different:
            raise FileError(f"checkpoint: {self.path} is of another pass: {different}; {_AGAIN}.")

    def rest(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Those that are not counted, while the others are compared with those that are."""
        digest = b""
        read = 0
        for batch in batches:
            digest = digest_of(batch, digest)
            read += 1
            if read <= self.counted:
                self._compare(read, digest.hex())
                continue
            before = generator_states(self.devices)
            yield batch
            after = generator_states(self.devices)
            if self.generators or any(
                not state.equal(after[name]) for name, state in before.items()
            ):
                self.generators = after
            self.counted = read
            self.first = self.first or digest.hex()
            self.last = digest.hex()
            if time.monotonic() >= self._due:
                self.write()
        if read < self.counted:
            raise FileError(
                f"checkpoint: {self.path} has counted {self.counted} batches, but there are {read};"
                f" {_AGAIN}."
            )
        if self.counted > self.written:
            self.write()

    def write(self) -> None:
        """Keep what is counted. The file replaces the older one only when it is complete.

        Raises:
            BadOption: something counted cannot be kept.
            FileError: it cannot be written.
        """
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        document = {
            "format": FORMAT,
            "facts": self.facts,
            "counted": [self.counted, self.first, self.last],
            "generators": pack(self.generators, tensors),
            "state": self._packed(tensors),
        }
        try:
            write_tensors(self.path, tensors, {_FILE_KEY: json.dumps(document)})
        except FileError as error:
            raise FileError(
                f"checkpoint: {self.path} cannot be written ({error}); what it held is still there."
            ) from error
        self.written = self.counted
        now = time.monotonic()
        self._due = now + max(_SECONDS, (now - start) / _SHARE)

    def _packed(self, tensors: dict[str, Tensor]) -> Any:
        try:
            return pack(self.counts.state(), tensors)
        except TypeError as error:
            raise BadOption(
                f"checkpoint: what is counted holds a {error}, which cannot be kept in a file; a"
                " Statistic can hand over numbers, texts and tensors in state(). Else leave"
                " checkpoint= out."
            ) from error

    def _compare(self, read: int, digest: str) -> None:
        """Refuse batches that are not the counted ones; go on with their random numbers."""
        which = "the first one is another" if read == 1 else "one behind the first is another"
        if (read == 1 and digest != self.first) or (read == self.counted and digest != self.last):
            raise FileError(
                f"checkpoint: {self.path} has counted {self.counted} batches, and in these data"
                f" {which}; give the same batches in the same order, or {_AGAIN}."
            )
        if read == self.counted:
            set_generator_states(self.generators)


def _check_order(batches: Any) -> None:
    """Refuse a loader whose order will not come again."""
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        raise BadOption(
            "checkpoint: the loader shuffles, so that its batches will not come again in the same"
            " order; pass shuffle=False, or generator= with a seed."
        )


def _read_document(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of a file, which may be something else all the same."""
    tensors, metadata = read_tensors(path)
    if _FILE_KEY not in metadata:
        holds = ", ".join(sorted(metadata.keys() - {CHECKSUM})) or "something else"
        raise FileError(f"it holds {holds}")
    if CHECKSUM not in metadata:
        raise FileError("it has no checksum, with which every one is written")
    document = parse_json(metadata[_FILE_KEY])
    _check_format(document["format"])
    return tensors, document


def _check_format(number: Any) -> None:
    if number != FORMAT:
        raise FileError(f"it is of format {number!r}, this version reads {FORMAT}")


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two passes, in words."""
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def _rank() -> tuple[int, int]:
    """The rank of this process and how many there are."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _of_this_rank(path: Path) -> Path:
    rank, ranks = _rank()
    return path if ranks == 1 else path.with_name(f"{path.name}.rank{rank}")
