"""Attention logits of one sequence, mean over heads: what figures 5 and 6 of the paper show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.layers import layer_indices
from biassurgery.adapters.registry import Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import BadBatch, BadOption
from biassurgery.measure.reading import reading
from biassurgery.measure.record import record
from biassurgery.measure.together import in_step, together

_CELLS = 256


def mean_attention_logits(
    model: nn.Module,
    sequence: Batch,
    layers: int | Sequence[int] | None = None,
    *,
    cells: int = _CELLS,
    tower: Tower | None = None,
) -> dict[int, Tensor]:
    """Attention logits (before the softmax) of one sequence, mean over heads, by layer.

    One forward a layer, so that the logits of a single layer are held at a time. Source: Sun et al.
    2024, section 4.1, figures 5 and 6.

    Args:
        model: a model of a supported architecture.
        sequence: a batch of one row; see `detect`.
        layers: 0-based; None: all that have an attention.
        cells: of a longer sequence means over runs of neighbouring queries and keys are kept, as
            many as this; they are what a picture can show.
        tower: `vision` (default) or `text`, of a model that has both.

    Returns:
        (n, n) float32 on the CPU by layer, n = T or at most `cells`; NaN where no query looks.

    Raises:
        BadBatch: several rows.
        BadOption, LayerOutOfRange: cells below 1, or a layer that there is not.
        UnsupportedModel: the attention of this architecture does not go through this library's
            core.
    """
    with together("mean_attention_logits", model):
        if isinstance(cells, bool) or not isinstance(cells, int) or cells < 1:
            raise BadOption(f"cells: {cells!r}; give a number from 1.")
        host = find_host(model, tower)
        batch = next(in_step(as_batches(host, sequence), host.root))
        chosen = attentions(host, None if layers is None else layer_indices(host, layers))
        means: dict[int, Tensor] = {}
        with reading(host.model):
            for layer in chosen:
                with record(model, "logits", layers=layer, tower=tower) as rec:
                    host.adapter.run(host.model, batch)
                logits = rec["logits"][layer]
                if len(logits) != 1:
                    raise BadBatch(f"sequence: {len(logits)} rows; give one, such as batch[:1].")
                means[layer] = _pooled(logits[0], cells)
        return means


def _pooled(logits: Tensor, cells: int) -> Tensor:
    """(H, T, S) with -inf where a query does not look, as means over heads and runs (n, n)."""
    total = torch.where(logits.isfinite(), logits, 0.0).sum(0)
    count = logits.isfinite().sum(0).float()
    for dim in (0, 1):
        total, count = (_runs(each, dim, cells) for each in (total, count))
    return (total / count).cpu()


def _runs(values: Tensor, dim: int, cells: int) -> Tensor:
    """Sums over runs of equal length along a dimension, at most `cells` of them."""
    size = -(-values.shape[dim] // cells)
    runs = [run.sum(dim) for run in values.split(size, dim)]
    return torch.stack(runs, dim)
