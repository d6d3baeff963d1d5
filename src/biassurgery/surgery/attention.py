"""How one attention module is changed: its own forward, with its softmax led to the core."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Edit, Place
from biassurgery.surgery.heads import HeadShare
from biassurgery.surgery.joined import joined
from biassurgery.surgery.swap import Swapped, check_swappable
from biassurgery.surgery.threads import this_thread
from biassurgery.surgery.tracing import check_not_traced


class AttentionEdit(Edit):
    """Changes or watches one attention module.

    Its parameters are in the model's state dict, under the module and `child`.

    Attributes:
        child: the name of the child of the attention module that this edit becomes.
        route: the mixin through which the host's attention reaches the core.
        reads_input: whether `attention_input` of the module is used.
        reads_cache: whether `cache` of the call is used.
        reads_call: whether the tensors of the call are used; if not, they may be those of a share
            of the heads.
        share: how the heads lie on tensor-parallel ranks; None: one has all.
    """

    route: type[EditedAttention]
    reads_input: bool = False
    reads_cache: bool = False
    reads_call: bool = True
    share: HeadShare | None = None

    @property
    def mixin(self) -> type[Swapped]:  # type: ignore[override]
        return self.route

    @property
    def has_columns(self) -> bool:
        """Whether it may add columns to the softmax."""
        return type(self).columns is not AttentionEdit.columns

    @property
    def reads_output(self) -> bool:
        """Whether it does anything with what the heads return."""
        kind = type(self)
        base = AttentionEdit
        return kind.change is not base.change or kind.see is not base.see

    def forward(self, step: str, *args: Any) -> Any:
        """`columns` or `change`, run through here.

        accelerate brings parameters that it keeps elsewhere for the time of a forward only.
        """
        return getattr(self, step)(*args)

    def columns(self, call: Call) -> Columns | None:
        """Further columns of the softmax."""
        return None

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        """The output of the heads (B, H, T, dv), changed."""
        return out

    def one_query(self, call: Call) -> Tensor | None:
        """The head outputs (1, H, 1, dv) for one query of one sequence, columns included.

        A way that is shorter than the core's, for calls that are `plain`; None: there is none.
        """
        return None

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        """Look at one attention: the head outputs (B, H, T, dv) and the log-sum-exp (B, H, T).

        The log-sum-exp is of all logits, columns included.
        """

    def see_output(self, attention_input: Tensor | None, output: Tensor) -> None:
        """Look at what the attention module read (B, T, D) and returned (B, T, D).

        Asked of edits that read the input.
        """


class EditedAttention(Swapped):
    """Mixed in front of an attention module's class.

    Each subclass is one way from the host's forward to `attended`.
    """

    # What the forward of each thread reads, and what its keys are cached in, where an edit wants to
    # know; lent, so that the module has no more than it had when the last edit goes.
    attention_reads: dict[int, tuple[Tensor | None, Any]]
    layer_idx: int  # of the host, where it caches
    lent = ("attention_reads",)

    @classmethod
    def lend(cls, module: nn.Module) -> dict[str, Any]:
        return {"attention_reads": {}}

    @classmethod
    def check_host(cls, module: nn.Module) -> None:
        """Raise `UnsupportedModel` if the module's softmax is one that the core does not know."""

    @classmethod
    def check_input(cls) -> None:
        """Raise `UnsupportedModel` if what the module reads or returns is not its attention's."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the attention reads (B, T, D), in the arguments of its forward.

        Raises:
            UnsupportedModel: it is not among them by the name that is known.
        """
        if not args and "hidden_states" not in kwargs:
            names = ", ".join(kwargs) or "nothing"
            raise UnsupportedModel(
                f"model: an attention was called with {names}, where what it reads is its first"
                " argument or called hidden_states; unpatch the model and register an adapter with"
                " attention() whose route has a read() of its own."
            )
        return args[0] if args else kwargs["hidden_states"]

    def returned(self, output: Any) -> Tensor:
        """What it returns (B, T, D), in the result of its forward."""
        return output if isinstance(output, Tensor) else output[0]

    def through(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, with its softmax led to `attended`."""
        return super().forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, with what the edits want to know of its input at hand."""
        edits = self.children_of(AttentionEdit)
        if not any(edit.reads_input or edit.reads_cache for edit in edits):
            return self.through(*args, **kwargs)
        caches = [x for x in (*kwargs.values(), *args) if hasattr(type(x), "moves_start")]
        if not caches and not any(edit.reads_input for edit in edits):
            return self.through(*args, **kwargs)
        reads = self.read(args, kwargs)
        thread = this_thread()
        self.attention_reads[thread] = reads, caches[0] if caches else None
        try:
            output = self.through(*args, **kwargs)
            for edit in edits:
                edit.see_output(reads, self.returned(output))
        finally:
            del self.attention_reads[thread]
        return output

    def attended(self, call: Call) -> Tensor:
        """The head outputs (B, H, T, dv) with all edits."""
        check_not_traced(call.q)
        edits = self.children_of(AttentionEdit)
        if len(edits) == 1 and call.plain() and edits[0].share is None:
            _, cache = self._read_by_this_thread()
            out = None if cache is not None else edits[0]("one_query", call)
            if out is not None:
                return out
        return self.attend_with_edits(call)[0]

    def _read_by_this_thread(self) -> tuple[Tensor | None, Any]:
        nothing = None, None
        return self.attention_reads.get(this_thread(), nothing) if self.attention_reads else nothing

    def attend_with_edits(self, call: Call) -> tuple[Tensor, Tensor]:
        """The head outputs (B, H, T, dv), and the log-sum-exp (B, H, T) of all logits.

        Columns are included in both.
        """
        check_not_traced(call.q)
        edits = self.children_of(AttentionEdit)
        reads, cache = self._read_by_this_thread()
        if cache is not None:
            call = call._replace(cache=cache.layers[self.layer_idx])
        share = next((edit.share for edit in edits if edit.share is not None), None)
        if share is not None and share.is_share(call):
            return _attend_with_share(edits, call, share, reads)
        columns = joined([*_sinks_of(call), *_columns_of(edits, call)], call)
        looking = [edit for edit in edits if edit.reads_output]
        out, lse = _attend(call, columns)
        for edit in looking:
            out = edit("change", call, out, reads)
            edit.see(call, columns, out, lse)
        return out, lse


def check_attention(module: nn.Module, layer: int) -> None:
    """Raise `UnsupportedModel` if the class of this attention would not decide how it runs."""
    check_swappable(module, f"the attention of block {layer}")


def _attend(call: Call, columns: Columns | None) -> tuple[Tensor, Tensor]:
    """The core, on a call with further columns."""
    return attend(
        call.q,
        call.k,
        call.v,
        mask=call.mask,
        causal=call.causal,
        scale=call.scale,
        dropout=call.dropout,
        softcap=call.softcap,
        columns=columns,
        weights=call.weights,
    )


def _attend_with_share(
    edits: list[AttentionEdit], call: Call, share: HeadShare, reads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An attention that has one rank's share of the heads, with edits, which are given all heads.

    `reads` is what the attention module reads, as far as an edit wants to know.
    """
    reads_call = any(edit.reads_call for edit in edits)
    whole = share.whole(call) if reads_call else call
    parts = _columns_of(edits, whole)
    own = [share.own_columns(part) for part in parts]
    out, lse = _attend(call, joined([*_sinks_of(call), *own], call))
    if not any(edit.reads_output for edit in edits):
        return out, lse
    columns = joined([*_sinks_of(whole), *parts], whole) if reads_call else None
    whole_out = share.gathered(out)
    whole_lse = share.gathered(lse)
    for edit in edits:
        whole_out = edit("change", whole, whole_out, reads)
        edit.see(whole, columns, whole_out, whole_lse)
    return share.own(whole_out), lse


def _sinks_of(call: Call) -> list[Columns]:
    """The host's own sinks as columns, if it has any."""
    return [] if call.sinks is None else [Columns(call.sinks[:, None, None], None, None)]


def _columns_of(edits: list[AttentionEdit], call: Call) -> list[Columns]:
    """The columns of those edits that have some."""
    given = [edit("columns", call) for edit in edits if edit.has_columns]
    return [part for part in given if part is not None]


class Shape(NamedTuple):
    """Sizes of one attention: heads, and the channels of what it computes with and reads.

    Query heads, key-value heads, the channels of a key, of a value, and of what is read.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    width: int


class Attention(NamedTuple):
    """What an adapter says of the attention of one block.

    Attributes:
        module: the attention module.
        route: the way from it to the core.
        shape: its sizes.
        whole: the module around it that returns what the attention gives to the residual stream;
            None: it does so itself.
        share: how its heads lie on tensor-parallel ranks, which `attentions` finds out; None: one
            has all.
    """

    module: nn.Module
    route: type[EditedAttention]
    shape: Shape
    whole: nn.Module | None = None
    share: HeadShare | None = None

    def place(self, layer: int, edit: AttentionEdit) -> Place:
        """An edit that goes to this attention."""
        edit.share = self.share
        return Place(layer, self.module, edit)
