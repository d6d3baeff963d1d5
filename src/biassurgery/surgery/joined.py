"""The columns that several edits add to one softmax, as one set."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.columns import Columns
from biassurgery.surgery.call import Call


def joined(parts: list[Columns], call: Call) -> Columns | None:
    """All columns as one set.

    Raises:
        UnsupportedModel: the attention has other heads than they were made for.
    """
    _check_heads(parts, call)
    if len(parts) < 2:
        return parts[0] if parts else None
    shape = torch.broadcast_shapes(*(part.logit.shape[:-1] for part in parts))
    logit = torch.cat([part.logit.expand(*shape, part.logit.shape[-1]) for part in parts], -1)
    return Columns(
        logit,
        _stacked([p.key for p in parts], parts, call.k),
        _stacked([p.value for p in parts], parts, call.v),
    )


def _check_heads(parts: list[Columns], call: Call) -> None:
    """Refuse columns of other heads than the attention's: some models are pruned of heads.

    One set alone may have as many as there are query heads.
    """
    for like, tensors in ((call.k, [p.key for p in parts]), (call.v, [p.value for p in parts])):
        _, heads, _, size = like.shape
        fitting = (heads,) if len(parts) > 1 else (heads, call.q.shape[1])
        shapes = [tuple(tensor.shape) for tensor in tensors if tensor is not None]
        wrong = [shape for shape in shapes if shape[0] not in fitting or shape[-1] != size]
        if wrong:
            raise UnsupportedModel(
                f"model: its attention has {heads} key-value heads of {size} channels, and explicit"
                f" biases of shapes {wrong} (heads, columns, channels) were made from its"
                " projections: heads were pruned, or are repeated before the attention function;"
                " prune heads before you patch it, or else register an adapter with attention()."
            )


def _stacked(tensors: list[Tensor | None], parts: list[Columns], like: Tensor) -> Tensor | None:
    """(Hkv, N, d): the keys or values of all columns, zeros where a part has none."""
    if all(tensor is None for tensor in tensors):
        return None
    filled = [
        like.new_zeros(like.shape[1], part.logit.shape[-1], like.shape[-1])
        if tensor is None
        else tensor
        for tensor, part in zip(tensors, parts)
    ]
    return torch.cat(filled, 1)
