"""One short sequence out of the data, on which a diagnosis confirms what it has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biassurgery.adapters.arguments import call
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.kept import rows_of
from biassurgery.measure.reading import reading
from biassurgery.measure.sequences import Sequences
from biassurgery.surgery.edit import Place, attached

LONGEST = 512  # tokens
SHORTEST = 16  # below which a mean loss says nothing
_TOKENS = ("input_ids", "inputs_embeds")
_SAYS_WHOSE = {"attention_mask", "position_ids", "labels", "token_type_ids"}


def sequence_of(host: Host, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first sequence of a batch by itself: no padding, and of a packed row one document.

    Raises:
        UnsupportedModel: the batch has arguments that may not be one a token.
    """
    if host.adapter.modality == "image":
        return rows_of(batch, [0])
    others = sorted(set(batch) - _SAYS_WHOSE - set(_TOKENS))
    if others:
        raise UnsupportedModel(
            f"batches have {', '.join(others)} besides their tokens, so one sequence cannot be"
            " taken out"
        )
    name = next(name for name in _TOKENS if name in batch)
    of = Sequences.read(host, batch).of[0].to(batch[name].device)
    tokens = batch[name][0][of == 0] if bool((of == 0).any()) else batch[name][0]
    return {name: tokens[None, :LONGEST]}


def why_no_loss(host: Host, sequence: Mapping[str, Any]) -> str:
    """Why the loss of a sequence cannot be measured; empty: it can."""
    if host.adapter.modality == "image":
        return "it is measured of text only"
    if not host.adapter.causal(host.model):
        return f"{type(host.model).__name__} does not predict the next token"
    if "input_ids" not in sequence:
        return "batches have embeddings, which do not say what is to be predicted"
    if sequence["input_ids"].shape[1] < SHORTEST:
        return f"the sequences have fewer than {SHORTEST} tokens"
    return ""


def losses(host: Host, sequence: Mapping[str, Any], places: Sequence[Place] = ()) -> Tensor | None:
    """(T - 1,) float64 on the CPU: what the model pays for each token of a sequence but the first.

    Args:
        host: a causal text model.
        sequence: from `sequence_of`.
        places: edits that are on the model meanwhile.

    Returns:
        None: the model has no head, and nothing was run but its blocks.
    """
    with reading(host.model), attached(places):
        output = call(host.model, host.adapter.inputs(host.model, sequence))
    return losses_in(host, sequence, output)


def losses_in(host: Host, sequence: Mapping[str, Any], output: Any) -> Tensor | None:
    """The same of what the model has returned for the sequence; None: there are no logits in it."""
    try:
        logits = host.adapter.logits(host.model, output)
    except UnsupportedModel:
        return None
    ids = sequence["input_ids"]
    if tuple(logits.shape[:2]) != tuple(ids.shape):
        return None
    target = ids[0, 1:].long().to(logits.device)
    return F.cross_entropy(logits[0, :-1].float(), target, reduction="none").double().cpu()


def run(host: Host, sequence: Mapping[str, Any], places: Sequence[Place]) -> None:
    """Run the blocks on a sequence with observers on them."""
    with reading(host.model), attached(places), torch.no_grad():
        host.adapter.run(host.model, dict(sequence))
