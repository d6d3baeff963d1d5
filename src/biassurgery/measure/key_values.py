"""The start token's implicit bias made explicit: measured, and put in the place of the token."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.devices import block_device, check_loaded
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.edits.transplant import position_shifts, transplant_edit
from biassurgery.errors import (
    BadBatch,
    NonFiniteActivation,
    SurgeryError,
    UnsupportedModel,
)
from biassurgery.findings.key_values import KeyValues
from biassurgery.measure.one_pass import eval_mode
from biassurgery.measure.ranks import gather
from biassurgery.ops.moments import moments
from biassurgery.surgery.attention import AttentionEdit
from biassurgery.surgery.block import hidden_of
from biassurgery.surgery.call import Call

START = 0  # the code of the role `start` of text models
TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
}  # of the largest output; 0.1 in half precision, where roundings add up


def calibrate_key_values(
    model: nn.Module, batches: Batch | Iterable[Batch], *, progress: bool | None = None
) -> KeyValues:
    """Mean key and value of the start token in every layer and head, for `patch_model(model,
    "transplant", key_values=...)`.

    Keys are what the softmax gets: after the rotation, which is the identity at position 0. Read in
        evaluation mode, without gradients,
    once; memory does not grow with the number of batches. Under `torch.distributed` all ranks get
    the sum.

    Args:
        model: a text model of a supported architecture.
        batches: as in `calibrate`; the first real token of each sequence counts, of each document
            in packed ones (`position_ids`).

    Raises:
        BadBatch, NonFiniteActivation: see their messages; the model is as it was.
        UnsupportedModel: also if the start token acts through more than its keys and values, found
            by transplanting one sequence.
    """
    host = find_host(model)
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
    chunk = host.adapter.attention_chunk(host.model)
    if chunk is not None:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} attends in chunks of {chunk} tokens, which cut the"
            " start token off from most of a sequence; transplant would not."
        )
    check_loaded(host)
    try:
        checked = as_batches(host, batches)
        first = next(checked)
        _verify(host, first)
        found: KeyValues | SurgeryError = _measure(
            host, chain([first], checked), sys.stderr.isatty() if progress is None else progress
        )
    except SurgeryError as error:
        found = error
    return gather(found)


class _StartEdit(AttentionEdit):
    """Sums the keys and values at the start tokens of the batch at hand."""

    child = "start_of_sequence"

    def __init__(self, route: Any) -> None:
        super().__init__()
        self.route = route
        self.starts = torch.empty(0, 2, dtype=torch.int64)
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, call: Call, columns: Any, out: Tensor, lse: Tensor) -> None:
        row, token = self.starts.to(call.k.device).unbind(1)
        for name, tensor in (("keys", call.k), ("values", call.v)):
            here = tensor[row, :, token].double().cpu()  # (N, Hkv, d)
            total, squares = self.sums.get(name, (torch.zeros((), dtype=torch.float64),) * 2)
            self.sums[name] = (total + here.sum(0), squares + here.square().sum(0))


def _measure(host: Host, batches: Iterable[dict[str, Any]], progress: bool) -> KeyValues:
    from tqdm.auto import tqdm

    found = list(attentions(host, range(len(host.blocks))).values())
    edits = [_StartEdit(each.route) for each in found]
    count = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), eval_mode(host.model):
        try:
            for each, edit in zip(found, edits):
                edit.attach(each.module)
            for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
                starts = _starts(host, batch)
                for edit in edits:
                    edit.starts = starts
                host.adapter.run(host.model, batch)
                count += len(starts)
        finally:
            for each, edit in zip(found, edits):
                edit.detach(each.module)
    if not count:
        raise BadBatch(
            "batches: there is no real token in them; give sequences that are not all padding."
        )
    for layer, edit in enumerate(edits):
        if not edit.sums:
            raise UnsupportedModel(
                f"model: the attention of block {layer} did not run; its key and value are not"
                " known."
            )
    for each, edit in zip(found, edits):
        sizes = {name: tuple(total.shape) for name, (total, _) in edit.sums.items()}
        shape = each.shape
        if sizes != {"keys": (shape.kv_heads, shape.key), "values": (shape.kv_heads, shape.value)}:
            raise UnsupportedModel(
                f"model: the attention of {type(host.model).__name__} reads {sizes}, where {shape}"
                " was expected; register an adapter with attention()."
            )
    keys, key_std = _moments([edit.sums["keys"] for edit in edits], count)
    values, value_std = _moments([edit.sums["values"] for edit in edits], count)
    return KeyValues(keys, values, key_std, value_std, count, host.architecture)


def _starts(host: Host, batch: dict[str, Any]) -> Tensor:
    """(N, 2) the row and the position of every start token of a batch."""
    shape = batch.get("input_ids", batch.get("inputs_embeds")).shape  # type: ignore[union-attr]
    return (host.adapter.token_roles(host.model, batch, (shape[0], shape[1])) == START).nonzero()


def _verify(host: Host, batch: dict[str, Any]) -> None:
    """Raise `UnsupportedModel` if a sequence without its start token, but with its key and value,
    comes out as another.
    """
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    start = _starts(host, batch)[:1]
    mask = batch.get("attention_mask")
    if not len(start):
        return  # all padding, which the measurement refuses
    row, first = start[0].tolist()
    end = batch[name].shape[1] if mask is None else int(mask[row].nonzero().max()) + 1
    sequence = batch[name][row : row + 1, first:end]
    if sequence.shape[1] < 2:
        return
    key_values = _measure(host, [{name: sequence}], False)
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        eval_mode(host.model),
        ExitStack() as undo,
    ):
        wanted = _output(host, {name: sequence})[:, 1:]
        for layer, attention in attentions(host).items():
            edit = transplant_edit(host, layer, attention, key_values)
            edit.to(device=block_device(host.blocks[layer]), dtype=wanted.dtype)
            undo.callback(edit.detach, attention.module)
            edit.attach(attention.module)
        for module, shift in position_shifts(host):
            undo.callback(shift.detach, module)
            shift.attach(module)
        found = _output(host, {name: sequence[:, 1:]})
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCES.get(wanted.dtype, 0.1):
        raise UnsupportedModel(
            f"model: the start token of {type(host.model).__name__} acts through more than its keys"
            " and values: without it, but with these, the output of a sequence is off by"
            f" {error:.2g} of its largest value; transplant cannot replace it on this architecture."
        )


def _output(host: Host, batch: dict[str, Any]) -> Tensor:
    """Logits or hidden states (1, T, ...) of a sequence."""
    return hidden_of(host.model(**host.adapter.inputs(host.model, batch)))


def _moments(sums: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (layers, Hkv, d), float32."""
    if len({total.shape for total, _ in sums}) > 1:
        raise UnsupportedModel(
            "model: its layers have heads of different shapes,"
            f" {[tuple(t.shape) for t, _ in sums]}; key values of such a model cannot be held in"
            " one table."
        )
    mean, std = moments(
        torch.stack([total for total, _ in sums]),
        torch.stack([squares for _, squares in sums]),
        count,
    )
    if not mean.isfinite().all():
        raise NonFiniteActivation(
            "batches: the keys or values of the start token hold NaN or infinity; run the model in"
            " bfloat16 or float32."
        )
    return mean, std
