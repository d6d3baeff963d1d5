"""The start token's implicit bias made explicit: measured, and put in the place of the token."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import call, parameters_of
from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.devices import block_device, check_loaded
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.edits.transplant import transplant_edit
from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.sums import Sums
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.continued import continued, in_chunks
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.sequences import START
from biassurgery.measure.token_positions import count_edits, fresh, shift_edits
from biassurgery.ops.columns import Columns
from biassurgery.ops.moments import moments
from biassurgery.surgery.attention import AttentionEdit, EditedAttention, Shape
from biassurgery.surgery.block import hidden_of
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place, attached

# of the largest output; 0.1 in half precision, where roundings add up
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
ROUNDINGS = 4  # so many times the error of one way to run a sequence, another may have
PADDING = 2  # tokens before the sequence, and how many of its own, when it is read in parts
CONTINUED = 8


def calibrate_key_values(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> KeyValues:
    """Mean key and value of the start token in every layer and head.

    For `patch_model(model, "transplant", key_values=...)`. Keys are what the softmax gets: after
    the rotation, which is the identity at position 0. Read in evaluation mode, without gradients,
    once; memory does not grow with the number of batches. Under `torch.distributed` every rank
    reads its own batches and all get the sum.

    Args:
        model: a text model of a supported architecture.
        batches: as in `calibrate`; the first real token of each sequence counts, of each document
            in packed ones (`position_ids`).
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        progress: show a progress bar; None: only on a terminal.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch, NonFiniteActivation: see their messages; the model is as it was.
        RankFailed: another rank has failed, or does not answer.
        UnsupportedModel: also if the start token acts through more than its keys and values, found
            by transplanting one sequence.
        BadOption, FileError: `checkpoint` cannot be used, or is of another pass.
    """
    with taking_part("calibrate_key_values", model, group) as ranks:
        host = find_host(model)
        _check_has_start(host)
        check_loaded(host)
        checked = ranks.apart(as_batches(host, batches))
        first = next(checked)
        _verify(host, first)
        sums = Sums()
        every = chain([first], checked)
        kept = checkpointed(every, checkpoint, "calibrate_key_values", host, sums, batches=batches)
        return ranks.total(_measure(host, kept, progress, sums))


def _check_has_start(host: Host) -> None:
    """Refuse models whose start token does not act, or acts through more than attention."""
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads images, which have no start token; key"
            " values are of text models."
        )
    if host.adapter.recurrent(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} keeps a recurrent state, which hands on more of"
            " the start token than its keys and values; transplant cannot replace it on this"
            " architecture."
        )
    crossing = host.adapter.only_with_images(host.model)
    if crossing:
        raise UnsupportedModel(
            f"model: blocks {list(crossing)} of {type(host.model).__name__} attend to images, so"
            " they have no key and no value of a start token; key values are of models whose blocks"
            " all attend to text."
        )
    chunk = host.adapter.attention_chunk(host.model)
    if chunk is not None:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in chunks of {chunk} tokens, which cut the"
            " start token off from most of a sequence; transplant would not."
        )


class _StartEdit(AttentionEdit):
    """Adds up the keys and values at the start tokens of every batch, (Hkv, d) float64 each.

    Attributes:
        starts: (N, 2) int64, row and position of the start tokens of the batch at hand.
        sums: of keys and values, and of their squares, by (layer, name).
    """

    child = "start_of_sequence"

    def __init__(self, layer: int, route: type[EditedAttention], sums: Sums) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.starts = torch.empty(0, 2, dtype=torch.int64)
        self.sums = sums

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        row, token = self.starts.to(call.k.device).unbind(1)
        for name, tensor in (("keys", call.k), ("values", call.v)):
            at_start = tensor[row, :, token].double().cpu()  # (N, Hkv, d)
            sums = torch.stack([at_start.sum(0), at_start.square().sum(0)])
            self.sums.add((self.layer, name), sums)


def _measure(
    host: Host, batches: Iterable[dict[str, Any]], progress: bool | None, sums: Sums
) -> KeyValues:
    attending = attentions(host, range(len(host.blocks)))
    edits = {
        layer: _StartEdit(layer, attention.route, sums) for layer, attention in attending.items()
    }
    places = [Place(layer, attending[layer].module, edit) for layer, edit in edits.items()]
    places += count_edits(host)  # the start token stands where it does without padding
    with reading(host.model), attached(places):
        for batch in with_bar(batches, "calibrating", progress):
            starts = _starts(host, batch)
            for edit in edits.values():
                edit.starts = starts
            host.adapter.run(host.model, batch)
            sums.add("starts", len(starts))
    count = sums.get("starts", 0)
    if not count:
        raise BadBatch(
            "batches: there is no real token in them; give sequences that are not all padding."
        )
    for layer, attention in attending.items():
        _check_sums(host, layer, attention.shape, sums)
    keys, key_std = _moments([sums[layer, "keys"] for layer in attending], count)
    values, value_std = _moments([sums[layer, "values"] for layer in attending], count)
    return KeyValues(keys, values, key_std, value_std, count, host.architecture)


def _check_sums(host: Host, layer: int, shape: Shape, sums: Sums) -> None:
    """Refuse an attention that did not run, or whose heads are not what the adapter says."""
    if (layer, "keys") not in sums:
        raise UnsupportedModel(
            f"model: the attention of block {layer} did not run; its key and value are not known."
        )
    sizes = {name: tuple(sums[layer, name].shape[1:]) for name in ("keys", "values")}
    if sizes != {"keys": (shape.kv_heads, shape.key), "values": (shape.kv_heads, shape.value)}:
        raise UnsupportedModel(
            f"model: the attention of {type(host.model).__name__} reads {sizes}, where {shape}"
            " was expected; register an adapter with attention()."
        )


def _starts(host: Host, batch: dict[str, Any]) -> Tensor:
    """(N, 2) the row and the position of every start token of a batch."""
    shape = batch.get("input_ids", batch.get("inputs_embeds")).shape  # type: ignore[union-attr]
    return (host.adapter.token_roles(host.model, batch, (shape[0], shape[1])) == START).nonzero()


def _verify(host: Host, batch: dict[str, Any]) -> None:
    """Raise `UnsupportedModel` if key and value do not stand in for a sequence's start token."""
    sequence = _first_sequence(host, batch)
    if sequence is None:
        return
    name, whole = sequence
    if whole.shape[1] < 2:
        return
    key_values = _measure(host, [{name: whole}], False, Sums())
    with reading(host.model), fresh(host):
        # Behind the start token; some models give the logits of the last token only.
        with_token = _output(host, {name: whole})[:, 1 - whole.shape[1] :]
        places = _transplant(host, key_values, with_token.dtype)
        start, rest = whole[:, :1], whole[:, 1 : 1 + CONTINUED]
        padding = rest[:, :1].repeat_interleave(PADDING, 1)  # any real token
        # Learned positions are those of real tokens only if they are given.
        before = padding if host.adapter.rotates(host.model) else padding[:, :0]
        parts_with_token = _in_parts(host, name, [before, start], rest)
        with attached(places):
            without = _output(host, {name: whole[:, 1:]})
            parts = _in_parts(host, name, [padding], rest)
    error = _off(without, with_token, with_token)
    tolerance = TOLERANCES.get(with_token.dtype, 0.1)
    if not error <= tolerance:
        raise UnsupportedModel(
            f"model: the start token of {type(host.model).__name__} acts through more than its keys"
            " and values: without it, but with these, the output of a sequence is off by"
            f" {error:.2g} of its largest value; transplant cannot replace it on this architecture."
        )
    error_in_parts = max(map(_off, parts, parts_with_token, repeat(with_token)), default=0.0)
    if not error_in_parts <= ROUNDINGS * max(tolerance, error):
        raise UnsupportedModel(
            f"model: without its start token, but with its keys and values, the output of"
            f" {type(host.model).__name__} is off by {error_in_parts:.2g} of its largest value"
            " where a sequence stands behind padding or continues a cache; transplant cannot"
            " replace it on this architecture."
        )


def _in_parts(host: Host, name: str, before: list[Tensor], rest: Tensor) -> list[Tensor]:
    """Outputs (1, T, ...) of the rest of a sequence, of parts that continue a cache.

    Args:
        before: (1, L) or (1, L, D) what stands before the rest: padding, then a start token.
        rest: of tokens (1, T) or embeddings (1, T, D).
    """
    if "attention_mask" not in parameters_of(host.model):
        return []
    lead = sum(tokens.shape[1] for tokens in before)
    count = rest.shape[1]
    sizes = [lead + count - 3, 2, 1] if count > 3 else [lead + count]
    name = host.adapter.ids if name == "input_ids" else name
    parts = in_chunks(name, torch.cat((*before, rest), 1), before[0].shape[1:2], sizes)
    outputs = [hidden_of(output) for output in continued(host, parts)]
    # Some models give the logits of the last token only.
    outputs[0] = outputs[0][:, min(lead, outputs[0].shape[1] - 1) :]
    return outputs


def _off(found: Tensor, wanted: Tensor, whole: Tensor) -> float:
    """The largest difference, over the largest magnitude of a whole sequence's output."""
    return ((found - wanted).abs().max() / whole.abs().max()).item()


def _first_sequence(host: Host, batch: dict[str, Any]) -> tuple[str, Tensor] | None:
    """The first sequence, and the name of the argument that it is; None: all is padding.

    It goes from the first start token to the row's last real one. What is all padding is refused by
    the measurement.
    """
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    start = _starts(host, batch)[:1]
    if not len(start):
        return None
    row, first = start[0].tolist()
    mask = batch.get("attention_mask")
    end = batch[name].shape[1] if mask is None else int(mask[row].nonzero().max()) + 1
    return name, batch[name][row : row + 1, first:end]


def _transplant(host: Host, key_values: KeyValues, dtype: torch.dtype) -> list[Place]:
    """The edits that put key values in the place of the start token."""
    places = []
    for layer, attention in attentions(host).items():
        edit = transplant_edit(host, layer, attention, key_values)
        edit.to(device=block_device(host.blocks[layer]), dtype=dtype)
        places.append(Place(layer, attention.module, edit))
    return places + shift_edits(host)


def _output(host: Host, batch: dict[str, Any]) -> Tensor:
    """Logits or hidden states (1, T, ...) of a sequence."""
    return hidden_of(call(host.model, host.adapter.inputs(host.model, batch)))


def _moments(sums: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (layers, Hkv, d), float32, from (2, Hkv, d) of every layer."""
    if len({of_layer.shape for of_layer in sums}) > 1:
        raise UnsupportedModel(
            "model: its layers have heads of different shapes,"
            f" {[tuple(of_layer.shape[1:]) for of_layer in sums]}; key values of such a model"
            " cannot be held in one table."
        )
    total, squares = torch.stack(sums, 1)
    mean, std = moments(total, squares, count)
    if not mean.isfinite().all():
        raise NonFiniteActivation(
            "batches: the keys or values of the start token hold NaN or infinity; run the model in"
            " bfloat16 or float32."
        )
    return mean, std
