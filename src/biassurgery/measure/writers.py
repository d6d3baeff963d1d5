"""What writes into the residual stream, read off the graph that autograd keeps of one forward.

A hidden state is a sum: of what embeds the input, and of what each branch of each block adds. The
walk goes back from it through everything that is linear, and ends at the last weights of each
addend: the table of an embedding, the last linear layer of a branch, or the norm or the scale
behind that. These times a factor, the hidden state is times that factor. No architecture is known
here, so that a model which nobody has described is read alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel

Weights = dict[nn.Parameter, bool]  # and whether a weight is stored as w of 1 + w

# Nodes of the graph, by their names without "Backward0". Times a factor, what goes into these comes
# out times that factor.
LINEAR = frozenset(
    [
        "Add",
        "Sub",
        "Neg",
        "Alias",
        "AsStrided",
        "Cat",
        "Chunk",
        "Clone",
        "ConstantPadNd",
        "Copy",
        "Expand",
        "Flip",
        "Gather",
        "IndexAdd",
        "IndexCopy",
        "IndexPut",
        "IndexSelect",
        "Index",
        "MaskedFill",
        "MaskedScatter",
        "Mean",
        "NativeDropout",
        "Permute",
        "Repeat",
        "ReshapeAlias",
        "Roll",
        "Scatter",
        "ScatterAdd",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "Stack",
        "Sum",
        "T",
        "ToCopy",
        "Transpose",
        "Unbind",
        "UnsafeSplit",
        "UnsafeView",
        "Unsqueeze",
        "UpsampleBicubic2D",
        "UpsampleBicubic2DAa",
        "UpsampleBilinear2D",
        "UpsampleBilinear2DAa",
        "View",
        "Where",
    ]
)
# Which operands are multiplied with each other, and which are added to the product.
PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Mul": ((0, 1), ()),
    "Mm": ((0, 1), ()),
    "Bmm": ((0, 1), ()),
    "GroupedMm": ((0, 1), ()),
    "Addmm": ((1, 2), (0,)),
    "Baddbmm": ((1, 2), (0,)),
    "Linear": ((0, 1), (2,)),
    "Convolution": ((0, 1), (2,)),
}
NORMS = frozenset(["NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"])
_FIRST = frozenset(["Div", "Embedding"])  # linear in the first operand


class NotScaleFree(UnsupportedModel):
    """What writes into a hidden state is no product with a weight."""


@contextmanager
def graphed(model: nn.Module) -> Iterator[None]:
    """Within the block every weight of the model is in the graph that autograd keeps."""
    frozen = [p for p in model.parameters() if p.dtype.is_floating_point and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def writers(hidden: Tensor) -> Weights:
    """The weights that a hidden state is linear in, of each of its addends the last ones.

    Args:
        hidden: (B, T, D), computed inside `graphed`.

    Raises:
        NotScaleFree: an addend is no product with a weight; the message says what it is.
    """
    return _written(hidden.grad_fn)


def _written(start: Any) -> Weights:
    found: Weights = {}
    seen: set[Any] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        operands = [operand for operand, _ in node.next_functions]
        kind = _kind(node)
        weight = _weight(node)
        if weight is not None:
            found |= weight
        elif kind in LINEAR:
            pending += operands
        elif kind in _FIRST:
            pending.append(operands[0])
        elif kind in NORMS:
            found |= _of_norm(operands, kind)
        elif kind in PRODUCTS:
            factors, added = PRODUCTS[kind]
            found |= _of_product([operands[i] for i in factors], kind)
            pending += [operands[i] for i in added if i < len(operands)]
        else:
            raise NotScaleFree(f"what {kind} returns, in which no weight is a factor")
    return found


def _of_product(factors: list[Any], kind: str) -> Weights:
    """The weights of one factor: a weight itself, else what the other factor cannot be told of."""
    weights = [weight for factor in factors if (weight := _weight(factor)) is not None]
    if weights:
        return weights[-1]
    reason = NotScaleFree(f"a product ({kind}) in which no weight is a factor")
    for factor in factors:
        try:
            found = _written(factor)
        except NotScaleFree as error:
            reason = error
            continue
        if found:
            return found
    raise reason


def _of_norm(operands: list[Any], kind: str) -> Weights:
    found: Weights = {}
    for operand in operands[1:]:
        found |= _weight(operand) or {}
    if not found:
        raise NotScaleFree(f"a norm without weights ({kind})")
    return found


def _weight(node: Any) -> Weights | None:
    """The weight that a node is, seen through views and casts; None: it is more than that."""
    plus_one = False
    while node is not None and not hasattr(node, "variable"):
        kind = _kind(node)
        operands = [operand for operand, _ in node.next_functions if operand is not None]
        if kind == "Add" and len(node.next_functions) == 2 and len(operands) == 1:
            plus_one = True  # norms of 1 + w
        elif kind not in LINEAR or kind in ("Add", "Sub"):
            return None
        if len(operands) != 1:
            return None
        node = operands[0]
    return None if node is None else {node.variable: plus_one}


def _kind(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", type(node).__name__)
