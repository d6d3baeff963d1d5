"""Where a model's tokens stand: the edits that see to it, tried on the model.

A key that is not among a sequence's own (an explicit bias, a transplanted start token) stands at a
position of its own, so that it matters whether a model counts padding. Most do, unless positions
are given; those that make positions themselves, such as models of images and text, each in their
own way. So they are asked: what arrives at the embedding of positions is what they made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import parameters_of
from biassurgery.adapters.devices import input_device
from biassurgery.adapters.offloaded import hollow
from biassurgery.adapters.registry import Host
from biassurgery.errors import AlreadyPatched, SurgeryError, UnsupportedModel
from biassurgery.measure.continued import continued, in_chunks
from biassurgery.measure.reading import reading
from biassurgery.surgery.edit import Place, attached, edits_of
from biassurgery.surgery.positions import CountEdit, PositionEdit, ShiftEdit

# The trial: two rows of tokens, the first with padding before it, in three forwards with a cache: a
# prompt, several tokens, a single one.
ROWS = 2
PADDING = 2
CHUNKS = (5, 2, 1)
# What models raise that miss an argument.
HOST_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def shift_edits(host: Host) -> list[Place]:
    """The edits that let the tokens behind a start token that has left keep their positions.

    Raises:
        AlreadyPatched: there are some.
        UnsupportedModel: with padding or a cache, positions would not be those of the sequence.
    """
    positions = host.adapter.positions(host.model)
    if any(isinstance(edit, ShiftEdit) for module, _ in positions for edit in edits_of(module)):
        raise AlreadyPatched(
            "mode: the positions are shifted already; unpatch_model(model, 'transplant') first."
        )
    shifts = [Place(None, module, ShiftEdit(1, argument)) for module, argument in positions]
    return shifts + (tried_counts(host) if positions else [])


def count_edits(host: Host) -> list[Place]:
    """The edits that let a model count from the first real token, where it turns keys by position.

    Positions that a whole model of images and text makes for its decoder are tried.

    Raises:
        UnsupportedModel: with padding or a cache, positions would not be those of the sequence.
    """
    makers = host.adapter.position_makers(host.model)
    if not host.adapter.rotates(host.model) or not makers:
        return []
    return tried_counts(host) if host.adapter.nested(host.model) else [_count(host, makers[-1])]


def tried_counts(host: Host) -> list[Place]:
    """Those edits, found by running the model on a few tokens.

    The module next to the blocks counts, and those around it only where they make positions that
    count padding, so that positions of images stay what their model makes them.

    Raises:
        UnsupportedModel: with padding or a cache, positions are not those of the sequence.
    """
    makers = host.adapter.position_makers(host.model)
    if "attention_mask" not in parameters_of(host.model):
        return [_count(host, maker) for maker in makers[-1:]]
    if found := _found_before(host, makers):
        return found
    with reading(host.model), fresh(host), hollow(host.root):
        counts = _trial(host, makers)
    if counts is None:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} counts the positions of a left-padded batch, or of"
            " one that continues a cache, in a way that is not known, so a key with a position of"
            " its own would stand at a wrong distance; use a model whose forward takes"
            " position_ids."
        )
    return counts


def _found_before(host: Host, makers: list[nn.Module]) -> list[Place]:
    """The same edits again where another patch has found that those around must count, or none.

    Tried with that patch on, the module next to the blocks would seem to do alone, and positions
    that it shifts would seem to be the model's own.
    """
    firsts = {
        maker: edit.first
        for maker in reversed(makers)
        for edit in edits_of(maker)
        if isinstance(edit, CountEdit)
    }
    if not any(maker in firsts for maker in makers[:-1]):
        return []
    return [_count(host, maker, first) for maker, first in firsts.items()]


def _trial(host: Host, makers: list[nn.Module]) -> list[Place] | None:
    """The edits by which padded and cached tokens stand where others do; None: no such are known.

    Raises:
        UnsupportedModel: the model does not run on token ids alone.
    """
    counts: list[Place] = []
    try:
        plain = _arriving(host, [], [_plain(host)])
        first = int(plain[0].flatten()[0])
        for maker in reversed(makers):
            if counts and any(positions.dim() > 2 for positions in plain):
                break  # those of images have several axes
            counts.append(_count(host, maker, first if counts else 0))
            if _same(plain, _arriving(host, counts, _chunks(host))):
                return counts
        if not makers and _same(plain, _arriving(host, [], _chunks(host))):
            return []
    except SurgeryError:
        raise
    except HOST_ERRORS as error:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} does not run on token ids alone"
            f" ({type(error).__name__}: {error}), so how it counts positions cannot be seen; pass"
            " its language model."
        ) from error
    return None


def _count(host: Host, maker: nn.Module, first: int = 0) -> Place:
    return Place(None, maker, CountEdit(list(parameters_of(maker)), host.adapter.ids, first))


class _Arriving(PositionEdit):
    """Keeps the positions that arrived last."""

    child = "position_watch"
    last: Tensor | None = None

    def forward(self, positions: Tensor) -> Tensor:
        self.last = positions
        return positions


def _arriving(
    host: Host, counts: Sequence[Place], chunks: Sequence[dict[str, Any]]
) -> list[Tensor]:
    """(..., ROWS, T) what arrives at each embedding of positions, of chunks in a row.

    As far as the model reads the chunks, see `continued`.
    """
    places = [
        Place(None, module, _Arriving(argument))
        for module, argument in host.adapter.positions(host.model)
    ]
    seen: list[list[Tensor]] = [[] for _ in places]
    with attached([*counts, *places]):
        for _ in continued(host, chunks):
            for positions, place in zip(seen, places):
                assert isinstance(place.edit, _Arriving)
                if place.edit.last is not None:
                    positions.append(_by_row(place.edit.last))
    return [torch.cat(positions, -1) for positions in seen if positions]


def _by_row(positions: Tensor) -> Tensor:
    """(..., ROWS, T) positions (T,), (1 or ROWS, T) or (..., 1 or ROWS, T)."""
    rows = positions if positions.dim() > 1 else positions[None]
    return rows.cpu().expand(*rows.shape[:-2], ROWS, -1)


def _same(plain: list[Tensor], chunked: list[Tensor]) -> bool:
    """Whether each row's tokens stand where they do without padding."""
    return len(plain) == len(chunked) and all(
        torch.equal(found[..., 0, PADDING:], wanted[..., 0, : found.shape[-1] - PADDING])
        and torch.equal(found[..., 1, :], wanted[..., 1, : found.shape[-1]])
        for wanted, found in zip(plain, chunked)
    )


def _plain(host: Host) -> dict[str, Any]:
    """The arguments of a forward on tokens of text, (ROWS, sum(CHUNKS)), without a mask."""
    size = host.adapter.vocabulary(host.model) or 2
    reserved = host.adapter.reserved(host.model)
    words = [word for word in range(size) if word not in reserved][-ROWS * sum(CHUNKS) :]
    ids = torch.tensor(words, device=input_device(host.model)).repeat(ROWS * sum(CHUNKS))
    return {host.adapter.ids: ids[: ROWS * sum(CHUNKS)].view(ROWS, -1)}


def _chunks(host: Host) -> list[dict[str, Any]]:
    """The same in chunks with their mask, the first row behind padding."""
    return in_chunks(host.adapter.ids, _plain(host)[host.adapter.ids], (PADDING, 0), CHUNKS)


@contextmanager
def fresh(host: Host) -> Iterator[None]:
    """Within the block the model knows nothing of the prompts before; afterwards, what it knew.

    Models of images and text keep how far the images of a prompt moved the positions behind them.
    """
    kept = [
        (maker, name, vars(maker)[name])
        for maker in host.adapter.position_makers(host.model)
        for name in host.adapter.remembered
        if name in vars(maker)
    ]
    try:
        for maker, name, _ in kept:
            setattr(maker, name, None)
        yield
    finally:
        for maker, name, value in kept:
            setattr(maker, name, value)
