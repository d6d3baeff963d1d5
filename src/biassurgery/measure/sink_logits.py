"""One logit a head in the place of a key k': what a stock class with sinks can hold of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.edits.bias import KeyBias
from biassurgery.errors import BadBatch, BadOption
from biassurgery.measure.reading import reading
from biassurgery.measure.record import record
from biassurgery.surgery.edit import edits_of

_HALVINGS = 60
_ROUNDING = 2.0**-24  # of a share in float32: beyond it the others' logits are not known


def fit_sink_logits(model: nn.Module, batches: Batch | Iterable[Batch]) -> Tensor:
    """Logits that, whatever the query, take the share of attention that k' takes on average.

    With s the logit of k', and l the log-sum-exp of a query's other logits, the k' of a head takes
    the share sigmoid(s - l) of each query; the fitted logit b has the same mean of sigmoid(b - l)
    over the real queries. It stays behind k' where that tells queries apart.

    Args:
        model: with `transplant` on it, or `attention_bias` of kind kv or k, at every layer.
        batches: as the model reads them; 24 bytes are kept for every query and head.

    Returns:
        (layers, heads) float32 on the CPU.

    Raises:
        BadOption: an attention has no k', or another explicit bias, too.
        BadBatch: no data.
    """
    host = find_host(model)
    layers = _layers_with_keys(host)
    others: dict[int, list[Tensor]] = {layer: [] for layer in layers}  # (H, N) of each batch
    shares: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with reading(host.model):
        for batch in as_batches(host, batches):
            with record(host.model, ("lse", "bias_mass"), layers, device="cpu") as rec:
                host.adapter.run(host.model, batch)
            roles = None
            for layer in layers:
                lse, share = (rec[name][layer].double() for name in ("lse", "bias_mass"))
                if roles is None:
                    rows, _, tokens = lse.shape
                    roles = host.adapter.token_roles(host.model, batch, (rows, tokens)).cpu()
                real = roles != PADDING
                rest = torch.log1p(-share.clamp(max=1 - _ROUNDING))
                others[layer].append((lse + rest).transpose(0, 1)[:, real])
                shares[layer].append(share.transpose(0, 1)[:, real])
    if not others[layers[0]]:
        raise BadBatch("batches: there are none; give some, as the model reads them.")
    fitted = [_fitted(torch.cat(others[n], 1), torch.cat(shares[n], 1)) for n in layers]
    return torch.stack(fitted).float()


def _layers_with_keys(host: Host) -> list[int]:
    found = []
    for layer, attention in attentions(host).items():
        edits = [edit for edit in edits_of(attention.module) if hasattr(edit, "columns")]
        if len(edits) != 1 or not isinstance(edits[0], KeyBias):
            raise BadOption(
                f"model: layer {layer} has not one k' to fit a logit to; put 'transplant' on the"
                " model, or 'attention_bias' of kind 'kv', and no other bias."
            )
        found.append(layer)
    return found


def _fitted(others: Tensor, shares: Tensor) -> Tensor:
    """(H,) logits b with mean sigmoid(b - others) = mean shares, both (H, N), by bisection."""
    wanted = shares.mean(1)
    low = others.amin(1) - 50
    high = others.amax(1) + 50
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = (middle[:, None] - others).sigmoid().mean(1) < wanted
        low = torch.where(below, middle, low)
        high = torch.where(below, high, middle)
    return (low + high) / 2
