"""Whether a start token acts through its keys and values alone: one sequence transplanted."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.arguments import call, parameters_of
from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.devices import block_device
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.edits.transplant import transplant_edit
from biassurgery.errors import NonFiniteActivation, UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.measure.continued import continued, in_chunks
from biassurgery.measure.reading import reading
from biassurgery.measure.rounding import rounding
from biassurgery.measure.token_positions import fresh, shift_edits
from biassurgery.surgery.block import hidden_of
from biassurgery.surgery.edit import Place, attached

# of the largest output; 0.1 in half precision, where roundings add up
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
ROUNDINGS = 4  # so many times the error of one way to run a sequence, another may have
PADDING = 2  # tokens before the sequence, and how many of its own, when it is read in parts
CONTINUED = 8


def verify(host: Host, name: str, whole: Tensor, key_values: KeyValues) -> None:
    """Raise if key and value do not stand in for the start token of a sequence.

    Args:
        host: a text model.
        name: of the argument that the sequence is.
        whole: (1, T) tokens or (1, T, D) embeddings, T at least 2.
        key_values: of that sequence.

    Raises:
        UnsupportedModel: they do not, or it cannot be told.
        NonFiniteActivation: what the model says of the sequence is not finite.
    """
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
    if not with_token.isfinite().all():
        raise NonFiniteActivation(
            f"batches: the output of a sequence holds NaN or infinity; {what_to_do(host)}."
        )
    error = _off(without, with_token, with_token)
    tolerance = TOLERANCES.get(with_token.dtype, 0.1)
    if not error <= tolerance:
        raise UnsupportedModel(_why_not(host, name, whole, error, tolerance))
    error_in_parts = max(map(_off, parts, parts_with_token, repeat(with_token)), default=0.0)
    if not error_in_parts <= ROUNDINGS * max(tolerance, error):
        raise UnsupportedModel(
            f"model: without its start token, but with its keys and values, the output of"
            f" {type(host.model).__name__} is off by {error_in_parts:.2g} of its largest value"
            " where a sequence stands behind padding or continues a cache; transplant cannot"
            " replace it on this architecture."
        )


def _why_not(host: Host, name: str, whole: Tensor, error: float, tolerance: float) -> str:
    """What makes the output of a sequence be off, as far as that can be told."""
    kind = type(host.model).__name__
    with reading(host.model):
        own = rounding(host, name, whole, lambda batch: _output(host, batch))
    if own > tolerance and error <= ROUNDINGS * own:
        return (
            f"model: {kind} rounds its activations too coarsely to tell whether its key values"
            " stand in for the start token: without it, but with these, the output of a sequence"
            f" is off by {error:.2g} of its largest value; and by itself it is off by {own:.2g}"
            " when another sequence stands beside it and the embeddings change by a hundred"
            " thousandth (int8 with dynamic scales does that). Use calibrate_key_values of the"
            " model before it was quantised: transplant takes those here."
        )
    return (
        f"model: the start token of {kind} acts through more than its keys and values: without it,"
        f" but with these, the output of a sequence is off by {error:.2g} of its largest value;"
        " transplant cannot replace it on this architecture."
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


def _transplant(host: Host, key_values: KeyValues, dtype: torch.dtype) -> list[Place]:
    """The edits that put key values in the place of the start token."""
    places = []
    for layer, attention in attentions(host).items():
        edit = transplant_edit(host, layer, attention, key_values)
        edit.to(device=block_device(host.blocks[layer]), dtype=dtype)
        places.append(attention.place(layer, edit))
    return places + shift_edits(host)


def _output(host: Host, batch: dict[str, Any]) -> Tensor:
    """Logits or hidden states (1, T, ...) of a sequence."""
    return hidden_of(call(host.model, host.adapter.inputs(host.model, batch)))
