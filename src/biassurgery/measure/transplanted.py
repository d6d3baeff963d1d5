"""Whether a start token acts through its keys and values alone: one sequence transplanted."""

from __future__ import annotations

from collections.abc import Iterable
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


class Trial:
    """One sequence, whole and in parts that continue a cache, with its start token and without.

    Args:
        host: a text model.
        name: of the argument that the sequence is.
        whole: (1, T) tokens or (1, T, D) embeddings, T at least 2.

    Attributes:
        with_token, without: arguments of the model; `without` is for one that is transplanted.
        parts_with_token, parts: the same for parts, as `continued` takes them, of the first few
            tokens behind padding; none, where the model takes no mask.
    """

    def __init__(self, host: Host, name: str, whole: Tensor) -> None:
        self.host = host
        self.name = name
        self.whole = whole
        self.with_token = host.adapter.inputs(host.model, {name: whole})
        self.without = host.adapter.inputs(host.model, {name: whole[:, 1:]})
        start, rest = whole[:, :1], whole[:, 1 : 1 + CONTINUED]
        padding = rest[:, :1].repeat_interleave(PADDING, 1)  # any real token
        # Learned positions are those of real tokens only if they are given.
        before = padding if host.adapter.rotates(host.model) else padding[:, :0]
        self.parts_with_token = _in_parts(host, name, [before, start], rest)
        self.parts = _in_parts(host, name, [padding], rest)

    def check(
        self, with_token: Any, without: Any, parts_with_token: Iterable[Any], parts: Iterable[Any]
    ) -> None:
        """Raise if what the model has returned differs.

        Raises:
            UnsupportedModel: key and value do not stand in for the start token, or it cannot be
                told.
            NonFiniteActivation: what the model says of the sequence is not finite.
        """
        host = self.host
        # Behind the start token; some models give the logits of the last token only.
        wanted = hidden_of(with_token)[:, 1 - self.whole.shape[1] :]
        if not wanted.isfinite().all():
            raise NonFiniteActivation(
                f"batches: the output of a sequence holds NaN or infinity; {what_to_do(host)}."
            )
        error = _off(hidden_of(without), wanted, wanted)
        tolerance = TOLERANCES.get(wanted.dtype, 0.1)
        if not error <= tolerance:
            raise UnsupportedModel(_why_not(host, self.name, self.whole, error, tolerance))
        errors = map(_off, self._rest(parts), self._rest(parts_with_token), repeat(wanted))
        error_in_parts = max(errors, default=0.0)
        if not error_in_parts <= ROUNDINGS * max(tolerance, error):
            raise UnsupportedModel(
                f"model: without its start token, but with its keys and values, the output of"
                f" {type(host.model).__name__} is off by {error_in_parts:.2g} of its largest value"
                " where a sequence stands behind padding or continues a cache; transplant cannot"
                " replace it on this architecture."
            )

    def _rest(self, outputs: Iterable[Any]) -> list[Tensor]:
        """Of parts, the outputs (1, T, ...) of the tokens that both ways have in common."""
        hidden = [hidden_of(output) for output in outputs]
        if hidden:
            # The first part has three tokens less than there are, or all; some models give the
            # logits of the last token only.
            count = min(CONTINUED, self.whole.shape[1] - 1)
            hidden[0] = hidden[0][:, -(count - 3 if count > 3 else count) :]
        return hidden


def verify(host: Host, name: str, whole: Tensor, key_values: KeyValues) -> None:
    """Raise if key and value do not stand in for the start token of a sequence.

    Args:
        host: a text model.
        name: of the argument that the sequence is.
        whole: (1, T) tokens or (1, T, D) embeddings, T at least 2.
        key_values: of that sequence.

    Raises:
        UnsupportedModel, NonFiniteActivation: see `Trial.check`.
    """
    trial = Trial(host, name, whole)
    with reading(host.model), fresh(host):
        with_token = call(host.model, trial.with_token)
        places = _transplant(host, key_values, hidden_of(with_token).dtype)
        parts_with_token = list(continued(host, trial.parts_with_token))
        with attached(places):
            without = call(host.model, trial.without)
            parts = list(continued(host, trial.parts))
    trial.check(with_token, without, parts_with_token, parts)


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


def _in_parts(host: Host, name: str, before: list[Tensor], rest: Tensor) -> list[dict[str, Any]]:
    """The arguments of forwards that read the rest of a sequence part by part.

    Args:
        host: the model.
        name: of the argument that the sequence is.
        before: (1, L) or (1, L, D) what stands before the rest: padding, then a start token.
        rest: of tokens (1, T) or embeddings (1, T, D).
    """
    if "attention_mask" not in parameters_of(host.model):
        return []
    lead = sum(tokens.shape[1] for tokens in before)
    count = rest.shape[1]
    sizes = [lead + count - 3, 2, 1] if count > 3 else [lead + count]
    name = host.adapter.ids if name == "input_ids" else name
    return in_chunks(name, torch.cat((*before, rest), 1), before[0].shape[1:2], sizes)


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
