"""Where [CLS] looks: its attention on every token of an image, without the T x T matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import LayerOutOfRange, UnsupportedModel
from biassurgery.findings.grid import prefix_of
from biassurgery.findings.sums import Sums
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step
from biassurgery.ops.columns import Columns
from biassurgery.ops.decompose import key_probs
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import attached


def cls_attention(
    model: nn.Module,
    images: Batch | Iterable[Batch],
    layer: int = -1,
    *,
    progress: bool | None = None,
) -> Tensor:
    """The share of [CLS]'s attention on every token: (B, H, T) float32.

    [CLS] itself comes first, then registers, then patches row by row. Patches on the model are part
    of what is read; the shares of explicit attention biases are what is missing to a sum of 1.

    Args:
        model: a vision transformer with [CLS] in front.
        images: `pixel_values` (B, C, H, W), or several batches of one size; see `detect`.
        layer: 0-based, or from the end; the default is the last.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        UnsupportedModel: it has no [CLS], or its attention does not go through this library's core.
        LayerOutOfRange: a layer that there is not.
        BadBatch: see its message.
    """
    rows: list[Tensor] = []
    host = _host(model)
    _read(host, as_batches(host, images), layer, rows.append, progress)
    return torch.cat(rows)


def attention_by_role(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    layer: int = -1,
    *,
    progress: bool | None = None,
    group: Group = None,
) -> dict[str, float]:
    """The share of [CLS]'s attention on each role, mean over images and heads.

    Roles are `cls`, each `register:<i>`, all patches together, and what is behind them. Sun et al.
    2024, section 5.2 and figure 16.

    Args:
        model: a vision transformer with [CLS] in front.
        batches: `pixel_values` (B, C, H, W), or several batches, also of several sizes.
        layer: 0-based, or from the end; the default is the last.
        progress: show a progress bar; None: only on a terminal.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        UnsupportedModel: it has no [CLS], or its attention does not go through this library's core.
        LayerOutOfRange: a layer that there is not.
        BadBatch: see its message.
        RankFailed: another rank has failed, or does not answer.
    """
    sums = Sums()
    with taking_part("attention_by_role", model, group) as ranks:
        host = _host(model)
        ranks.same(layer=layer)
        prefix = prefix_of(host.roles)
        behind = host.adapter.behind(host.model)

        def take(row: Tensor) -> None:
            row = row.mean(1).double()
            before, patches, after = row.split([prefix, row.shape[1] - prefix - behind, behind], 1)
            on_behind = [after.sum()[None]] if behind else []
            sums.add("roles", torch.cat([before.sum(0), patches.sum()[None], *on_behind]))
            sums.add("images", len(row))

        _read(host, ranks.apart(as_batches(host, batches)), layer, take, progress)
        total = ranks.total(sums)
    return dict(zip(host.roles, (total["roles"] / total["images"]).tolist()))


def _host(model: nn.Module) -> Host:
    host = find_host(model)
    if host.roles[0] != "cls" or host.adapter.causal(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} has no [CLS] token that attends to patches; its"
            f" tokens are {', '.join(host.roles)}. record(model, what='probs') has the attention of"
            " all tokens."
        )
    return host


def _read(
    host: Host,
    batches: Iterable[dict[str, Any]],
    layer: int,
    take: Callable[[Tensor], None],
    progress: bool | None,
) -> None:
    """Run the model on every batch and hand over the attention of [CLS], (B, H, T)."""
    count = len(host.blocks)
    if not -count <= layer < count:
        raise LayerOutOfRange(
            f"layer: {layer} is outside the model's blocks 0 to {count - 1}; -1 is the last."
        )
    (attention,) = attentions(host, [layer % count]).values()
    place = attention.place(layer % count, _FirstRow(attention.route, take))
    with reading(host.model), attached([place]):
        for batch in with_bar(in_step(batches, host.root), "attention of [CLS]", progress):
            host.adapter.run(host.model, batch)


class _FirstRow(AttentionEdit):
    """Hands over the first query's share of every key, and changes nothing."""

    child = "cls_attention"

    def __init__(self, route: type[EditedAttention], take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.route = route
        self.take = take

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        mask = None if call.mask is None else call.mask[..., :1, :]
        row = key_probs(call.q[:, :, :1], call.k, lse[:, :, :1], call.scale, mask, call.softcap)
        self.take(row[:, :, 0].float())
