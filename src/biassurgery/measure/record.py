"""`record`: what a model computes inside, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.layers import integers, layer_indices
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.measure.observe import Observer
from biassurgery.measure.recorder import NAMES as ATTENTION_NAMES
from biassurgery.measure.recorder import Recorder, SinkTokens, sinks_of
from biassurgery.surgery.block import cached_tokens, check, hidden_of

BLOCK_NAMES: dict[str, Literal["input", "output"]] = {
    "block_input": "input",
    "block_output": "output",
}
NAMES = (*BLOCK_NAMES, *ATTENTION_NAMES)
REUSED = (*BLOCK_NAMES, "k", "v")  # tensors that a model may write to later

Keep = Callable[[int, str, Tensor], None]
Step = dict[str, dict[int, Tensor]]


class _Layers(dict[int, Tensor]):
    """What was recorded, by layer."""

    def __missing__(self, layer: int) -> Tensor:
        raise BadOption(
            f"layers: {layer!r} was not recorded; the layers that were are {sorted(self)}."
        )


class Record(Mapping[str, Mapping[int, Tensor]]):
    """What was recorded: `rec[name][layer]` of the latest forward, `rec.steps[i][name][layer]` of
    every one.

    Attributes:
        steps: one entry a forward of the model, for example a step of cached decoding.
    """

    def __init__(self, what: tuple[str, ...], layers: tuple[int, ...]) -> None:
        self.what = what
        self.layers = layers
        self.steps: list[Step] = []

    def __getitem__(self, name: str) -> Mapping[int, Tensor]:
        if name not in self.what:
            raise BadOption(
                f"name: {name!r} was not recorded; record(model, what=({name!r}, ...)) would, this"
                f" has {', '.join(self.what)}."
            )
        if not self.steps:
            raise BadBatch(
                "model: it has not run since record() began; run it inside the `with` block."
            )
        return self.steps[-1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.what)

    def __len__(self) -> int:
        return len(self.what)


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
    """Record what a model computes within a `with` block; patches on the model are part of what is
    recorded.

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
            (B, H, T): the share that explicit biases take, 0 without any; `value_updates` (2, B, H,
            T, dv): what the heads return (Sun et al. 2024, section 4), split into the part from the
            start token, or `sink_tokens`, and that from all others, explicit biases included.
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
    chosen = (
        tuple(layer_indices(host, layers)) if layers is not None else tuple(range(len(host.blocks)))
    )
    names = _names(what)
    tokens = (
        None
        if sink_tokens is None
        else integers("sink_tokens", sink_tokens, "give one or more positions, counted from 0")
    )
    if tokens is not None and min(tokens) < 0:
        raise BadOption(
            f"sink_tokens: {tokens} has a negative one; count from the beginning of the sequence."
        )
    place = None if device is None else _device(device)
    tokens = tokens and tuple(dict.fromkeys(tokens))  # one that is named twice counts once
    found = Record(names, chosen)

    def keep(layer: int, name: str, tensor: Tensor) -> None:
        if _in_backward():  # gradient checkpointing runs a block again, with the same result
            return
        if not found.steps:
            raise BadBatch(
                "model: a block ran by itself; call the model, so that its inputs are known."
            )
        if layer in found.steps[-1][name]:
            raise UnsupportedModel(
                f"model: block {layer} has more than one {name} in a forward; layers that are"
                " looped, or attend twice, cannot be recorded."
            )
        if detach:
            tensor = tensor.detach().clone() if name in REUSED else tensor.detach()
        found.steps[-1][name][layer] = tensor if place is None else tensor.to(place)

    with ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        recorders = _on_attention(
            host, names, None if layers is None else chosen, not detach, keep, undo
        )
        _on_blocks(host, names, chosen, keep, undo)

        def begin(batch: dict[str, Any]) -> None:
            found.steps.append({name: _Layers() for name in names})
            if recorders:
                sinks = _sinks(host, batch, tokens)
                for recorder in recorders:
                    recorder.sinks = sinks

        _on_forward(host, begin, undo)
        yield found


def _names(what: str | Sequence[str]) -> tuple[str, ...]:
    names = (what,) if isinstance(what, str) else tuple(what)
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise BadOption(
            f"what: {unknown or 'nothing'} cannot be recorded; use one or more of"
            f" {', '.join(NAMES)}."
        )
    return tuple(dict.fromkeys(names))


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadOption(
            f"device: {device!r}; give a device of torch, such as 'cpu' or 'cuda:0'."
        ) from error


def _on_attention(
    host: Host,
    names: tuple[str, ...],
    layers: tuple[int, ...] | None,
    exact_gradient: bool,
    keep: Keep,
    undo: ExitStack,
) -> list[Recorder]:
    """A recorder on the attention of each layer, if one is needed; without `layers`, of each that
    has an attention.
    """
    wanted = tuple(name for name in names if name in ATTENTION_NAMES)
    if not wanted:
        return []
    recorders = []
    for layer, attention in attentions(host, layers).items():
        theirs = wanted
        if attention.whole is not None and "attention_output" in wanted:
            theirs = tuple(name for name in wanted if name != "attention_output")
            undo.callback(
                attention.whole.register_forward_hook(partial(_see_whole, layer, keep)).remove
            )
        recorder = Recorder(attention.route, theirs, exact_gradient, partial(keep, layer))
        undo.callback(recorder.detach, attention.module)
        recorder.attach(attention.module)
        recorders.append(recorder)
    return recorders


def _see_whole(layer: int, keep: Keep, _: nn.Module, args: Any, output: Any) -> None:
    keep(layer, "attention_output", hidden_of(output))


def _on_blocks(
    host: Host, names: tuple[str, ...], layers: tuple[int, ...], keep: Keep, undo: ExitStack
) -> None:
    """What is recorded at the ends of each block."""
    for layer in layers:
        check(host.blocks[layer], layer)
    for layer in layers:
        for name, at in BLOCK_NAMES.items():
            if name in names:
                observer = Observer(
                    layer,
                    host.layout,
                    lambda layer, hidden, name=name: keep(layer, name, hidden),
                    at,
                )
                undo.callback(observer.detach, host.blocks[layer])
                observer.attach(host.blocks[layer])


def _on_forward(host: Host, begin: Callable[[dict[str, Any]], None], undo: ExitStack) -> None:
    """Call `begin` with the arguments by name whenever the model starts, be it the whole or its
    body without the head.
    """
    if host.adapter.entry == "blocks":
        start = host.blocks[0].register_forward_pre_hook(
            lambda *_: None if _in_backward() else begin({}), prepend=True
        )
        undo.callback(start.remove)
        return
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        running.append(module)
        if len(running) == 1:
            begin(host.adapter.batch_of(module, args, kwargs))

    def leave(*_: Any) -> None:
        running.pop()

    body = host.adapter.body(host.model)
    for module in (host.model,) if body is host.model else (host.model, body):
        undo.callback(
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove
        )
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _sinks(host: Host, batch: dict[str, Any], tokens: tuple[int, ...] | None) -> SinkTokens:
    """The sinks of one forward, from the arguments of the model."""
    if host.adapter.entry == "blocks":
        return SinkTokens(torch.tensor(tokens or (0,)), None, 0)
    read = next(
        (
            value
            for name in ("input_ids", "inputs_embeds")
            if isinstance(value := batch.get(name), Tensor)
        ),
        None,
    )
    if read is None:
        raise BadBatch(
            f"model: it was run with {sorted(batch)}, but without input_ids or inputs_embeds."
        )
    return sinks_of(batch, read.shape[0], read.shape[1], int(cached_tokens(0, (), batch)), tokens)
