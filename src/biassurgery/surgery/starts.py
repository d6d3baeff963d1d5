"""Which tokens of a forward begin a sequence: told where a model is given mask and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.errors import BadBatch, UnsupportedModel, warn
from biassurgery.ops.at_hand import at_hand
from biassurgery.surgery.block import cached_tokens
from biassurgery.surgery.edit import Edit
from biassurgery.surgery.own_columns import own_columns
from biassurgery.surgery.swap import Swapped


class Starts(nn.Module):
    """What the edits of a forward share: which tokens are the first of a sequence.

    Attributes:
        tokens: (B, T) bool, of the last forward; None: there was none.
        begins: False where it is known that none of them is a first one.
    """

    begins: bool = True  # of files from before it was known, too

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tensor | None = None
        self.begins = True
        self._awaited = False  # a forward with gradients has not been computed anew since
        self._differs: bool | Tensor = False  # from it, what a later one has said

    def tell(self, tokens: Tensor) -> None:
        """A forward begins, with these tokens (B, T)."""
        if not torch.compiler.is_compiling():  # which computes anew what it has traced together
            self._differs = self._awaited and self._is_other(tokens)
            self._awaited = self._awaited or torch.is_grad_enabled()
        self.tokens = tokens
        self.begins = not at_hand(tokens) or any(map(any, tokens.tolist()))

    def _is_other(self, tokens: Tensor) -> bool | Tensor:
        assert self.tokens is not None  # it is awaited
        if tokens.shape != self.tokens.shape:
            return True
        return self._differs | (tokens != self.tokens).any()

    def check_anew(self) -> None:
        """Of a block that gradient checkpointing runs anew: whose tokens these are must be known.

        Raises:
            UnsupportedModel: several forwards wait for their gradients, with other tokens.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        self._awaited = False
        if self._differs:
            raise UnsupportedModel(
                "model: gradient checkpointing runs a block anew for one of several forwards whose"
                " sequences begin at different tokens, and for which 'pin' cannot tell; call"
                " backward() after each forward, and run those without one under torch.no_grad()."
            )


class Located(Swapped):
    """Mixed in front of the module next to the blocks that is given the mask."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for edit in self.children_of(StartEdit):
            edit.see({**dict(zip(edit.names, args)), **kwargs})
        return super().forward(*args, **kwargs)


class StartEdit(Edit):
    """Tells the edits of blocks, by `starts`, where sequences begin, and changes nothing.

    The first real token of a row does, and every token at position 0 (packed documents), as long as
    no token of the row is in the cache. Shapes are static, and nothing is read back to the host.

    Args:
        names: of the arguments of the module's forward, in order.
        ids: which of them are the token ids.
        start_id: the token that sequences began with where levels were measured, if it was one: a
            warning says if another stands there. None: it is not known.
    """

    child = "start_edit"
    several = True
    mixin = Located

    def __init__(self, names: list[str], ids: str, start_id: int | None = None) -> None:
        super().__init__()
        self.names = names
        self.ids = ids
        self.start_id = start_id
        self.starts = Starts()

    def see(self, given: dict[str, Any]) -> None:
        """A forward begins, with these arguments."""
        ids = given.get(self.ids)
        read = given.get("inputs_embeds") if ids is None else ids
        if read is None:
            raise BadBatch(
                f"model: it is run on neither {self.ids} nor inputs_embeds, so that the tokens that"
                " 'pin' writes to are not known; give one of them, or unpatch 'pin'."
            )
        starts = first_tokens(read, given, cached_tokens(0, (), given))
        self.starts.tell(starts)
        if self.start_id is not None and ids is not None and not torch.compiler.is_compiling():
            self._check_ids(ids, starts)

    def _check_ids(self, ids: Tensor, starts: Tensor) -> None:
        """Warn, once, of another start token; on the CPU only, for a GPU would be waited for."""
        if ids.device.type != "cpu" or not bool((starts & (ids != self.start_id)).any()):
            return
        other = int(ids[starts & (ids != self.start_id)][0])
        warn(
            f"pin: a sequence begins with token {other}, but its value was measured where all begin"
            f" with token {self.start_id}; put that token in front, or calibrate on sequences that"
            " begin as these do.",
        )
        self.start_id = None  # once is enough


def first_tokens(read: Tensor, given: Mapping[str, Any], cached: int | Tensor) -> Tensor:
    """(B, T) bool: which tokens begin a sequence.

    Args:
        read: (B, T) token ids or (B, T, D) embeddings, without what is cached.
        given: the other arguments of the forward: `attention_mask` (B, cached + T) and
            `position_ids` (B, T), where they are there.
        cached: how many tokens of the sequences are in the cache.

    Raises:
        BadBatch: the mask is not one of tokens, and there are no positions.
    """
    rows, length = read.shape[:2]
    mask = given.get("attention_mask")
    positions = given.get("position_ids")
    at_zero = None
    if isinstance(positions, Tensor) and positions.dim() == 2:
        at_zero = (positions == 0).expand(rows, length)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if at_zero is None:
            raise BadBatch(
                "attention_mask: it is not (B, T), 1 for real tokens and 0 for padding, so that the"
                " first token of a sequence is not known; give such a mask, or position_ids."
            )
        return at_zero
    if mask is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=read.device)
        # Of a whole sequence: behind a cache, nothing is first.
        first = real & (torch.arange(length, device=read.device) + cached == 0)
    else:
        whole = mask.to(torch.bool)
        real = own_columns(whole, length, given)
        first = real & own_columns(whole.cumsum(1) == 1, length, given)
        # A mask of the new tokens alone does not say what stands before them.
        first = first & (mask.shape[1] > length or cached == 0)
    return first if at_zero is None else first | (at_zero & real)
