"""`record`: what a model computes inside, while it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.layers import integers, layer_indices
from biassurgery.adapters.parallel import check_stream
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.adapters.scale import warn_of_scale
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.kinds import names_in
from biassurgery.measure.observe import Observer
from biassurgery.measure.quantities import (
    QUANTITIES,
    AttentionQuantity,
    BlockQuantity,
    Quantity,
)
from biassurgery.measure.recorded import Keeper, Record, in_backward
from biassurgery.measure.recorder import AttentionRecorder, BlockRecorder, ForwardWatch
from biassurgery.measure.seen import SinkTokens, sinks_of
from biassurgery.surgery.block import cached_tokens, check_block
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.swap import check_swappable


@contextmanager
def record(
    model: nn.Module,
    what: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    *,
    sink_tokens: int | Sequence[int] | None = None,
    detach: bool = True,
    device: torch.device | str | None = None,
    tower: Tower | None = None,
) -> Iterator[Record]:
    """Record what a model, with the patches on it, computes within a `with` block.

    A compiled model runs eagerly meanwhile. Only what is asked for is computed, and kept until the
    record is dropped.

    Args:
        model: a model of a supported architecture.
        what: one or more of
            `block_input`, `block_output` (B, T, D): the residual stream, patches included;
            `norm_output` (B, T, D): what the attention reads; `attention_output` (B, T, D): what it
                returns, after its projection;
            `q` (B, H, T, d), `k` (B, Hkv, S, d), `v` (B, Hkv, S, dv): with positions applied and
            cached keys included; `logits` (B, H, T, S) float32: scaled, -inf where a query does not
            look; `probs` (B, H, T, S): the attention; `sink_mass` (B, H, T): the share of each
            query's attention on the start token of its sequence, or on `sink_tokens`; `bias_mass`
            (B, H, T): the share that explicit biases take, 0 without any; `lse` (B, H, T) float32:
            the log-sum-exp of each query's logits, explicit biases included; `value_updates` (2, B,
            H, T, dv): what the heads return (Sun et al. 2024, section 4), split into the part from
            the start token, or `sink_tokens`, and that from all others, biases included;
            or a quantity of another package (a subclass of `biassurgery.extend.BlockQuantity` or
            `AttentionQuantity`).
        layers: indices; None: all (of the attention: all that have one).
        sink_tokens: positions in the sequence, cached tokens and padding included. None: the first
            token of each sequence that is not padding ([CLS] in images); 0 shares and updates where
            it has left a sliding cache.
        detach: whether gradients stop at what is recorded; if not, all (B, H, T, S) logits are
            computed for the shares.
        device: where to keep it; None: where it was computed.
        tower: `vision` (default) or `text`, of a model that has both.

    Raises:
        BadOption, LayerOutOfRange: a name, layer, position, device or tower that there is not.
        UnsupportedModel: the attention of this architecture does not go through this library's
            core.
    """
    host = find_host(model, tower)
    check_stream(host)
    all_layers = tuple(range(len(host.blocks)))
    chosen = all_layers if layers is None else tuple(layer_indices(host, layers))
    quantities = _quantities(what)
    tokens = _positions(sink_tokens)
    names = tuple(quantity.name for quantity in quantities)
    keeper = Keeper(Record(names, chosen), detach, _device(device))
    if set(names) & _OF_STREAM:
        warn_of_scale(host, "the residual stream, and what is added to it,")
    on_blocks = _on_blocks(host, quantities, chosen, keeper)
    on_attentions = _on_attentions(host, quantities, None if layers is None else chosen, keeper)

    def begin(arguments: dict[str, Any]) -> None:
        sinks = None
        if on_attentions:
            sinks = _sinks(host, host.adapter.canonical(arguments), tokens)
        keeper.begin(sinks)

    places = [*_on_forward(host, begin), *on_blocks, *on_attentions]
    with torch.compiler.set_stance("force_eager"), attached(places, all_threads=True):
        yield keeper.record


# quantities that `rescale` changes
_OF_STREAM = {"block_input", "block_output", "attention_output"}


def _quantities(what: str | Sequence[str]) -> list[Quantity]:
    """What was asked for, once each."""
    kinds = [QUANTITIES.find(name) for name in names_in("what", what, QUANTITIES)]
    if not kinds:
        raise BadOption(f"what: nothing to record; use one or more of {', '.join(QUANTITIES)}.")
    return [kind() for kind in dict.fromkeys(kinds)]


def _positions(sink_tokens: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The given sinks; one that is named twice counts once."""
    if sink_tokens is None:
        return None
    positions = integers("sink_tokens", sink_tokens, "give one or more positions, counted from 0")
    if min(positions) < 0:
        raise BadOption(
            f"sink_tokens: {positions} has a negative one; count from the beginning of the"
            " sequence."
        )
    return tuple(dict.fromkeys(positions))


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadOption(
            f"device: {device!r}; give a device of torch, such as 'cpu' or 'cuda:0'."
        ) from error


def _on_blocks(
    host: Host, quantities: list[Quantity], layers: tuple[int, ...], keeper: Keeper
) -> list[Place]:
    """What records the ends of each block."""
    for layer in layers:
        check_block(host.blocks[layer], layer)
    return [
        Place(layer, host.blocks[layer], BlockRecorder(layer, host.layout, quantity, keeper))
        for layer in layers
        for quantity in quantities
        if isinstance(quantity, BlockQuantity)
    ]


def _on_attentions(
    host: Host, quantities: list[Quantity], layers: tuple[int, ...] | None, keeper: Keeper
) -> list[Place]:
    """What records the attention of each layer that has one, or of `layers`, if it is asked for."""
    of_attention = [quantity for quantity in quantities if isinstance(quantity, AttentionQuantity)]
    if not of_attention:
        return []
    places: list[Place] = []
    for layer, attention in attentions(host, layers).items():
        recorder = AttentionRecorder(layer, attention, of_attention, keeper)
        places.append(attention.place(layer, recorder))
        if attention.whole is not None and recorder.of_module:
            # A module around the attention returns what goes to the residual stream.
            output = Observer(layer, "BTD", recorder.finish)
            places.append(Place(layer, attention.whole, output))
    return places


def _on_forward(host: Host, begin: Callable[[dict[str, Any]], None]) -> list[Place]:
    """What calls `begin` with the arguments by name when the model, or its body alone, starts."""
    if host.adapter.entry == "blocks":

        def begin_at_first(layer: int, hidden: Tensor) -> None:
            if not in_backward():
                begin({})

        first = Observer(0, host.layout, begin_at_first, "input")
        return [Place(None, host.blocks[0], first)]
    running = defaultdict[int, int](int)
    return [Place(None, module, ForwardWatch(begin, running)) for module in _entrances(host)]


def _entrances(host: Host) -> list[nn.Module]:
    """The model and its body without the head, each where its class decides how it runs.

    `model.forward = torch.compile(model.forward)` hides the model's, and its forward is then seen
    to begin in the body.

    Raises:
        UnsupportedModel: neither does.
    """
    body = host.adapter.body(host.model)
    entrances = []
    for module in (host.model,) if body is host.model else (host.model, body):
        with suppress(UnsupportedModel):
            check_swappable(module, "the model")
            entrances.append(module)
    if not entrances:
        check_swappable(host.model, "the model")
    return entrances


def _sinks(host: Host, batch: dict[str, Any], tokens: tuple[int, ...] | None) -> SinkTokens:
    """The sinks of one forward, from the arguments of the model by their canonical names."""
    if host.adapter.entry == "blocks":
        return SinkTokens(torch.tensor(tokens or (0,)), None, 0)
    inputs = (batch.get(name) for name in ("input_ids", "inputs_embeds"))
    read = next((value for value in inputs if isinstance(value, Tensor)), None)
    if read is None:
        raise BadBatch(
            f"model: it was run with {sorted(batch)}, but without input_ids or inputs_embeds."
        )
    cached = int(cached_tokens(0, (), batch))
    return sinks_of(batch, read.shape[0], read.shape[1], cached, tokens)
