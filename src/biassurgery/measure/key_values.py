"""The start token's implicit bias made explicit: measured, and put in the place of the token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, chosen_start, start_id
from biassurgery.errors import BadBatch, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.sums import Sums
from biassurgery.measure.by_blocks import Onload, by_blocks
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.progress import count_of
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.start_tokens import alone, starts_of
from biassurgery.measure.together import in_step
from biassurgery.measure.token_positions import count_edits
from biassurgery.measure.transplanted import verify
from biassurgery.ops.columns import Columns
from biassurgery.ops.moments import moments
from biassurgery.surgery.attention import AttentionEdit, EditedAttention, Shape
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place, attached


def calibrate_key_values(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    start: Start = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    onload: Onload = None,
    spill: str | Path | None = None,
    progress: bool | None = None,
    group: Group = None,
) -> KeyValues:
    """Mean key and value of the start token in every layer and head.

    For `patch_model(model, "transplant", key_values=...)`. Keys are what the softmax gets: after
    the rotation, which is the identity at position 0. Read in evaluation mode, without gradients,
    once; memory does not grow with the number of batches. In a causal model a start token sees
    nothing but itself, so that it alone is run, and each different one once a batch. Under
    `torch.distributed` every rank reads its own batches and all get the sum.

    Args:
        model: a text model of a supported architecture.
        batches: as in `calibrate`; the first real token of each sequence counts, of each document
            in packed ones (`position_ids`).
        start: a constant token to put in front of every sequence, see `calibrate`: the transplant
            is exact then.
        tokenizer: the model's, where `start` is a token.
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        onload, spill: for a model larger than memory, see `calibrate`; whether the transplant is
            exact is tried on one sequence in the ordinary way.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
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
        front = start_id(host, start, tokenizer)
        ranks.same(start=front)
        blocks = by_blocks(host, onload, spill, checkpoint)
        checked = ranks.apart(behind_start(host, as_batches(host, batches), front))
        first = next(checked)
        sequence = _first_sequence(host, first)
        tried = [] if sequence is None or sequence[1].shape[1] < 2 else [sequence]
        for name, whole in in_step(tried, host.root):
            verify(host, name, whole, _alone(host, {name: whole}))
        measuring = _Measuring(host)
        every = chain([first], checked)
        options = chosen_start(front)
        verb = "calibrate_key_values"
        if blocks is not None:
            blocks.read(measuring, every, verb, progress, batches, **options)
        else:
            kept = checkpointed(
                every, checkpoint, verb, host, measuring.sums, batches=batches, **options
            )
            measuring.read(kept, progress, count_of(batches) if checkpoint is None else None)
        return ranks.total(replace(measuring.result(), start=front))


def _check_has_start(host: Host) -> None:
    """Refuse models whose start token does not act, or acts through more than attention."""
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads {READS[host.adapter.modality]}, which has no"
            " start token; key values are of text models."
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
    check_causal(host)


def check_causal(host: Host) -> None:
    """Raise `UnsupportedModel` for an encoder, whose start token is no constant.

    Models of images and text may attend in both directions in the image alone, and their start
    token be a constant: the trial tells.
    """
    if not host.adapter.causal(host.model) and not host.adapter.nested(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in both directions, so that the keys and"
            " values of its first token depend on the tokens behind it, and no constant can take"
            " their place; transplant is for models that are causal."
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


class _Measuring:
    """Reads the start tokens of batches, by themselves where that is the same.

    Attributes:
        sums: of keys and values by layer, and how many `starts` there were.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sums = Sums()
        self.attending = attentions(host, range(len(host.blocks)))
        self.edits = {
            layer: _StartEdit(layer, attention.route, self.sums)
            for layer, attention in self.attending.items()
        }

    def places(self) -> list[Place]:
        places = [self.attending[layer].place(layer, edit) for layer, edit in self.edits.items()]
        return places + count_edits(self.host)  # starts stand where they do without padding

    def read(
        self, batches: Iterable[dict[str, Any]], progress: bool | None, total: int | None = None
    ) -> None:
        """Run the model on every batch."""
        with reading(self.host.model), attached(self.places()):
            for batch in with_bar(in_step(batches, self.host.root), "calibrating", progress, total):
                self.host.adapter.run(self.host.model, self.begin(batch))
                self.end()

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch is about to be read; what the model reads of it."""
        starts = starts_of(self.host, batch)
        by_itself = alone(self.host, batch, starts)
        self._count = len(starts)
        for edit in self.edits.values():
            edit.starts = starts if by_itself is None else by_itself.places
        return batch if by_itself is None else by_itself.batch

    def end(self) -> None:
        self.sums.add("starts", self._count)

    def suspend(self) -> None:
        """Nothing is known of a batch that the sums do not hold."""

    def resume(self, known: None) -> None:
        """Nothing has to be told."""

    def state(self) -> Any:
        return self.sums.state()

    def restore(self, state: Any) -> None:
        self.sums.restore(state)

    def result(self) -> KeyValues:
        count = self.sums.get("starts", 0)
        if not count:
            raise BadBatch(
                "batches: there is no real token in them; give sequences that are not all padding."
            )
        for layer, attention in self.attending.items():
            _check_sums(self.host, layer, attention.shape, self.sums)
        keys, key_std = self._moments("keys", count)
        values, value_std = self._moments("values", count)
        return KeyValues(keys, values, key_std, value_std, count, self.host.architecture)

    def _moments(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        return _moments(self.host, [self.sums[layer, name] for layer in self.attending], count)


def _alone(host: Host, batch: dict[str, Any]) -> KeyValues:
    """Those of one batch."""
    measuring = _Measuring(host)
    measuring.read([batch], progress=False)
    return measuring.result()


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


def _first_sequence(host: Host, batch: dict[str, Any]) -> tuple[str, Tensor] | None:
    """The first sequence, and the name of the argument that it is; None: all is padding.

    It goes from the first start token to the row's last real one. What is all padding is refused by
    the measurement.
    """
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    start = starts_of(host, batch)[:1]
    if not len(start):
        return None
    row, first = start[0].tolist()
    mask = batch.get("attention_mask")
    end = batch[name].shape[1] if mask is None else int(mask[row].nonzero().max()) + 1
    return name, batch[name][row : row + 1, first:end]


def _moments(host: Host, sums: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
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
            f"batches: the keys or values of the start token hold NaN or infinity;"
            f" {what_to_do(host)}."
        )
    return mean, std
