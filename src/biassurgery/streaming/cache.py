"""A cache of constant size that keeps the first tokens and the last ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from biassurgery.adapters.registry import find_host
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.streaming.probe import rotations_of
from biassurgery.streaming.rotation import Rotation


class SinkCache(Cache):
    """StreamingLLM's cache: the first `sinks` tokens and the latest others, `window` in all.

    A query sees the sinks and the last tokens, itself included, as if they were one sequence
    without a gap. Positions count the tokens of the whole stream, in `model(...)` as in `generate`;
    since rotary attention knows only distances, the sinks alone have to move, and they are turned
    anew for every token from what they were, so that nothing drifts. Until the first token is
    evicted all is as with `DynamicCache`. From there on tokens come one at a time (`generate(...,
    prefill_chunk_size=1)` for a prompt longer than the window). Source: Xiao et al. 2023.

    Args:
        model: a decoder of transformers with rotary positions, or MPT. It runs once, on two tokens,
            to see how its keys hold positions.
        window: tokens that a query sees, the sinks and itself included.
        sinks: tokens at the start that are kept; 0 for a plain sliding window.
        attention_mask: (B, T) of the first call: 0 at padding on the left, 1 at real tokens. Every
            row keeps its own first real tokens. Needed where there are several rows, even if it is
            all ones, for a cache is not told which tokens are padding.

    Raises:
        BadOption: numbers that do not fit together, or padding that is not on the left.
        UnsupportedModel: the model's keys cannot move (learned positions), or its mask does not
            follow a cache.
    """

    moves_start = True  # its layers have `turn_start`

    def __init__(
        self, model: nn.Module, window: int, sinks: int = 4, *, attention_mask: Tensor | None = None
    ) -> None:
        host = find_host(model)
        if not host.adapter.causal(host.model):
            raise UnsupportedModel(
                f"model: {type(host.model).__name__} attends in both directions, so that every new"
                " token changes those before it, and none can be kept; a cache is for models that"
                " are causal."
            )
        host.adapter.cache_arguments(host.model, self)  # which refuses models that take none
        _check_numbers(window, sinks)
        _check_limits(host.adapter.attention_limits(host.model), window)
        padding = None if attention_mask is None else _left_padding(attention_mask)
        if padding is not None and max(padding) + sinks > window:
            raise BadOption(
                f"window: {window} does not hold {max(padding)} tokens of padding and {sinks}"
                " sinks; give a larger one."
            )
        rotations = rotations_of(host)
        host.adapter.check_eviction(host.model, padding is not None and any(padding))
        super().__init__(
            layers=[SinkLayer(window, sinks, padding, rotation) for rotation in rotations]
        )

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise BadOption(
            "crop: a SinkCache cannot go back, for what it evicted is gone; start a new one"
            " (assisted generation needs another cache)."
        )


class SinkLayer(DynamicLayer):
    """The keys and values (B, H, T, d) of one layer: sinks in front, in the order of the stream."""

    is_croppable = False

    def __init__(
        self, window: int, sinks: int, padding: tuple[int, ...] | None, rotation: Rotation
    ) -> None:
        super().__init__()
        self.window = window
        self.sinks = sinks
        self.given_padding = padding
        self.rotation = rotation
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.keys = self.values = None
        # The keys of the sinks as they came, from the first eviction on.
        self.first: Tensor | None = None
        self.seen = 0
        self.padding = (0,)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.padding = _by_row(self.given_padding, len(key_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All that the new tokens see, themselves included.

        Raises:
            BadBatch: several tokens of which some would evict others, or several rows and no
                `attention_mask`.
        """
        new = key_states.shape[2]
        cached = self.get_mask_sizes(0)[0]
        if new > 1 and cached + new > self.window:
            raise BadBatch(
                f"input_ids: {new} tokens at once behind {cached} cached ones, where the window"
                f" holds {self.window}, and each would see another window; feed one at a time from"
                " there on (in generate: prefill_chunk_size=1)."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is None or self.values is None:
            self.keys = key_states.contiguous()
            self.values = value_states.contiguous()
        elif cached + new <= self.window:
            self.keys = torch.cat((self.keys, key_states), 2)
            self.values = torch.cat((self.values, value_states), 2)
        else:
            self._replace(self.keys, self.values, key_states, value_states)
        self.seen += new
        return self.keys, self.values

    def turn_start(self, keys: Tensor) -> Tensor:
        """Keys of the start of the stream, moved on to where the sinks stand now.

        (1, H, T, d) -> (1 or B, H, T, d).
        """
        moved = tuple(max(0, self.seen - self.window - padding) for padding in self.padding)
        return self.rotation(keys, moved) if any(moved) else keys

    def index_of(self, positions: Tensor) -> Tensor:
        """Where the tokens at positions (C,) of the stream are among the keys: (1 or B, C) int64.

        -1 where they have been evicted. With two sinks, a window of 5 and 9 tokens seen, none of
        them padding, the keys are those of positions 0 1 6 7 8, and position 6 is at 2.
        """
        positions = positions.cpu()[None]
        evicted = max(0, self.seen - self.window)
        padding = torch.tensor(self.padding)[:, None]
        # Padding goes first; the sinks lead the keys once it is gone.
        sinks_lead = evicted > padding
        is_sink = (positions >= padding) & (positions < padding + self.sinks)
        shifted = positions - evicted
        others = torch.where(shifted >= torch.where(sinks_lead, self.sinks, 0), shifted, -1)
        return torch.where(is_sink & sinks_lead, positions - padding, others)

    def _replace(self, keys: Tensor, values: Tensor, new_key: Tensor, new_value: Tensor) -> None:
        """Evict one token a row, padding first, and append one."""
        evicted = self.seen - self.window + 1
        moved = tuple(max(0, evicted - padding) for padding in self.padding)
        if self.first is None:
            self.first = _take(keys, torch.tensor(self.padding)[:, None] + torch.arange(self.sinks))
        start = self.rotation(self.first, moved)
        if all(moved):
            rest = slice(self.sinks + 1, None)
            self.keys = torch.cat((start, keys[:, :, rest], new_key), 2)
            self.values = torch.cat((values[:, :, : self.sinks], values[:, :, rest], new_value), 2)
        else:
            keys, values = (self._without_one(states, moved) for states in (keys, values))
            sinks_lead = torch.tensor(moved, device=keys.device).bool()[:, None, None, None]
            keys[:, :, : self.sinks] = torch.where(sinks_lead, start, keys[:, :, : self.sinks])
            self.keys = torch.cat((keys, new_key), 2)
            self.values = torch.cat((values, new_value), 2)

    def get_seq_length(self) -> int:
        """Tokens of the stream so far, evicted ones included: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """How many keys new tokens will see, and where in an attention mask these begin.

        transformers 4.57 gives the positions of the new tokens, not their number.
        """
        seen = self.seen + (query_length if isinstance(query_length, int) else len(query_length))
        return min(seen, self.window), max(0, seen - self.window)

    def get_max_length(self) -> int:
        """Tokens that are cached at most."""
        return self.window

    get_max_cache_shape = get_max_length  # the name in transformers 4.57

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one after the other."""
        if self.keys is not None:
            self.batch_select_indices(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows, in this order."""
        if self.keys is None or self.values is None:
            return
        if len(self.padding) > 1:
            self.padding = tuple(
                self.padding[row] for row in torch.arange(len(self.padding))[indices.cpu()].tolist()
            )
        indices = indices.to(self.keys.device)
        self.keys = self.keys[indices]
        self.values = self.values[indices]
        self.first = None if self.first is None else self.first[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows that beam search goes on with."""
        self.batch_select_indices(beam_idx)

    def _without_one(self, states: Tensor, moved: tuple[int, ...]) -> Tensor:
        """What stays of a full cache: rows lose padding first, then the token behind the sinks."""
        index = torch.arange(self.window - 1).repeat(len(moved), 1)
        lost = torch.tensor([self.sinks if away else 0 for away in moved])
        # A window of 5 without the token at 2: 0 1 2 3 becomes 0 1 3 4.
        return _take(states, index + (index >= lost[:, None]))


def _take(states: Tensor, index: Tensor) -> Tensor:
    """states (B, H, T, d) at tokens (1 or B, N)."""
    return states.take_along_dim(index.to(states.device)[:, None, :, None], 2)


def _by_row(padding: tuple[int, ...] | None, rows: int) -> tuple[int, ...]:
    """Padding of each row, one number where all are alike; a row given may stand for several.

    Beam search makes several rows of each: (0, 2) for four rows is (0, 0, 2, 2).
    """
    if padding is None and rows > 1:
        raise BadBatch(
            "attention_mask: not given to SinkCache, which then cannot tell the first real token"
            f" of each of {rows} rows from padding; make it with attention_mask= (B, T) of the"
            " prompt, of ones where nothing is padded."
        )
    padding = padding or (0,)
    if rows % len(padding):
        raise BadBatch(
            f"attention_mask: SinkCache was given {len(padding)} rows and the model {rows}; give"
            " the mask of the same batch."
        )
    if len(set(padding)) == 1:
        return padding[:1]
    return tuple(tokens for tokens in padding for _ in range(rows // len(padding)))


def _left_padding(mask: Tensor) -> tuple[int, ...]:
    """Tokens of padding in front of each row."""
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if (
        real is None
        or not real.numel()
        or not real[:, -1].all()
        or (real[:, :-1] & ~real[:, 1:]).any()
    ):
        raise BadOption(
            f"attention_mask: {tuple(mask.shape) if isinstance(mask, Tensor) else mask!r}; give one"
            " (B, T) with zeros for padding, on the left only, and a real token at the end of each"
            " row."
        )
    return tuple((~real).sum(1).tolist())


def _check_numbers(window: int, sinks: int) -> None:
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadOption(f"{name}: {value!r}; give a whole number, at least {least}.")
    if window <= sinks:
        raise BadOption(
            f"window: {window} leaves no room beside {sinks} sinks; it counts them too, give more."
        )


def _check_limits(limits: dict[str, int], window: int) -> None:
    """Refuse windows that the model's own attention would cut: it would hide the sinks first."""
    for name, limit in limits.items():
        if window > limit:
            raise BadOption(
                f"window: {window} is more than the {name} of the model, beyond which it sees"
                f" nothing; give at most {limit}."
            )
