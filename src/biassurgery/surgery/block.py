"""How one block is changed: the edits of its input, its own forward, the edits of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import Edit, edits_of
from biassurgery.surgery.swap import Swapped, check_swappable
from biassurgery.surgery.tracing import check_not_traced

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class EditedBlock(Swapped):
    """Mixed in front of a block's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        edits = self.children_of(BlockEdit)
        layers = [edit.cache_layer for edit in edits if edit.cache_layer is not None]
        start = cached_tokens(layers[0], args, kwargs) if layers else 0
        if args and isinstance(args[0], (tuple, list)):
            raise UnsupportedModel(
                f"model: a block was given {len(args[0])} hidden states in a list (nested tensors:"
                " crops of several sizes in one forward); run a patched or watched model on one"
                " tensor of images at a time."
            )
        before = _in_order([edit for edit in edits if edit.at == "input"])
        after = _in_order([edit for edit in edits if edit.at != "input"])
        if before:
            layout = before[0].layout
            hidden = _edited(input_of(args, kwargs, layout), before, start)
            args, kwargs = with_input(args, kwargs, hidden, layout)
        output = super().forward(*args, **kwargs)
        if not after:
            return output
        layout = after[0].layout
        return with_hidden(output, _edited(hidden_of(output, layout), after, start), layout)


class BlockEdit(Edit):
    """Changes a hidden state (B, T, D).

    Attributes:
        at: which hidden state of the block: what it reads, what it returns, or what leaves it after
            all other edits.
        watches: whether it only looks at the hidden state: it then sees what all others have made
            of it, also those that came later.
        positional: whether it goes by positions in the sequence.
        adds: how many tokens it adds to the sequence that the blocks read, behind the prefix
            tokens.
        width: channels of the hidden states that it is made for; None: it does not matter.
        layout: the axes of what its block returns, see `Adapter.layout`.
        mesh: of the tensor-parallel ranks, whose random numbers have to be `alike`; None: there is
            one rank.
        cache_layer: where `start` is needed, the number of tokens of the sequence that are in the
            cache already: the layer that is edited.
    """

    child = "activation_edit"
    several = True
    mixin = EditedBlock
    at: Literal["input", "output", "exit"] = "output"
    watches: bool = False
    positional: bool = False
    adds: int = 0
    width: int | None = None
    layout: str = "BTD"
    mesh: DeviceMesh | None = None
    cache_layer: int | None = None

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        """The hidden state (B, T, D), changed; the one that is given must stay as it is.

        Args:
            hidden: (B, T, D), in the model's dtype, whatever the layout of the host.
            start: how many tokens of the sequence are in the cache already; 0 without
                `cache_layer`.
        """
        raise NotImplementedError  # abstract


def _in_order(edits: list[BlockEdit]) -> list[BlockEdit]:
    """Edits in order of application, those that only watch behind all others, at the exit last."""
    if len(edits) < 2:
        return edits
    return sorted(edits, key=lambda edit: 2 if edit.at == "exit" else int(edit.watches))


def _edited(hidden: Tensor, edits: list[BlockEdit], start: int | Tensor) -> Tensor:
    for edit in edits:
        if edit.width not in (None, hidden.shape[-1]):
            raise UnsupportedModel(
                f"model: a block has a hidden state of {hidden.shape[-1]} channels where its"
                f" adapter says {edit.width}; unpatch the model and register an adapter with the"
                " right width."
            )
        hidden = edit(hidden, start)
    return hidden


def check_block(block: nn.Module, layer: int) -> None:
    """Raise `UnsupportedModel` if the class of this block would not decide how it runs."""
    check_swappable(block, f"block {layer}")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any], layout: str = "BTD") -> Tensor:
    """The hidden state (B, T, D) that a block is given: its first argument or `hidden_states`.

    Raises:
        UnsupportedModel: there is no tensor with so many axes in that place.
    """
    if not args and "hidden_states" not in kwargs:
        names = ", ".join(kwargs) or "nothing"
        raise UnsupportedModel(
            f"model: a block was called with {names}, where what it reads is its first argument or"
            " called hidden_states; unpatch the model, and change or watch the outputs of its"
            " blocks only."
        )
    return hidden_of(args[0] if args else kwargs["hidden_states"], layout)


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, layout: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with another hidden state (B, T, D)."""
    if args:
        return (with_hidden(args[0], hidden, layout), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": with_hidden(kwargs["hidden_states"], hidden, layout)}


def added_tokens(block: nn.Module) -> int:
    """How many tokens the edits of a first block add to the sequence, behind the prefix tokens."""
    return sum(edit.adds for edit in edits_of(block) if isinstance(edit, BlockEdit))


def hidden_of(output: Any, layout: str = "BTD") -> Tensor:
    """The hidden state (B, T, D) in what a block returned: the output or its first element.

    Args:
        output: a tensor, or a tuple, list or mapping (ModelOutput) that begins with one.
        layout: the axes of that tensor, see `Adapter.layout`; S parallel streams are read as one of
            S * D channels.

    Raises:
        UnsupportedModel: there is no tensor with so many axes in that place.
    """
    hidden = output
    if not isinstance(output, Tensor) and isinstance(output, (tuple, list, Mapping)):
        values = output.values() if isinstance(output, Mapping) else output
        hidden = [*values, None][0]  # an empty one has no hidden state
    check_not_traced(hidden)
    if not isinstance(hidden, Tensor) or hidden.dim() != len(layout):
        kind = type(hidden).__name__
        if isinstance(hidden, Tensor):
            kind = f"a tensor {tuple(hidden.shape)}"
        raise UnsupportedModel(
            f"model: a block returned {kind} where a hidden state ({', '.join(layout)}) was"
            " expected; unpatch the model and register an adapter whose blocks return one."
        )
    if hasattr(type(hidden), "device_mesh"):  # of the class: each block comes here at each step
        raise UnsupportedModel(
            "model: a block returned a DTensor, of which each rank has a part only; unpatch it, and"
            " let the blocks of its parallel plan hand on whole tensors (use_local_output=True,"
            " output_layouts=Replicate())."
        )
    return hidden if layout == "BTD" else hidden.permute(_axes(layout)).flatten(2)


def with_hidden(output: Any, hidden: Tensor, layout: str = "BTD") -> Any:
    """What a block returned, of the same type and layout, with another hidden state (B, T, D)."""
    if isinstance(output, Tensor):
        return hidden if layout == "BTD" else _laid_out(hidden, output, layout)
    if isinstance(output, Mapping):
        name = next(iter(output))
        return type(output)(**{**output, name: with_hidden(output[name], hidden, layout)})
    values = (with_hidden(output[0], hidden, layout), *output[1:])
    if isinstance(output, list):
        return list(values)
    is_named = hasattr(output, "_make")
    return type(output)._make(values) if is_named else values


def _axes(layout: str) -> list[int]:
    """Where the axes B, T, (S,) D are in a layout."""
    return [layout.index(axis) for axis in "BTSD" if axis in layout]


def _laid_out(hidden: Tensor, like: Tensor, layout: str) -> Tensor:
    """A hidden state (B, T, D) back in the layout and shape of `like`.

    In the layout SBTD the axes of B, T, S, D are 1 2 0 3; what is (B, T, S, D) gets back to
    (S, B, T, D) by the inverse permutation, 2 0 1 3.
    """
    axes = _axes(layout)
    inverse = [axes.index(axis) for axis in range(len(axes))]
    split = hidden.reshape([like.shape[axis] for axis in axes])
    return split.permute(inverse).contiguous()


def cached_tokens(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | Tensor:
    """How many tokens of the sequence a block's cache holds for this layer before it runs.

    Raises:
        UnsupportedModel: the cache is one of continuous batching, where the rows of a forward are
            not the sequences.
    """
    for value in (*kwargs.values(), *args):
        if type(value).__name__ == "PagedAttentionCache":
            raise UnsupportedModel(
                "model: continuous batching strings sequences together, and its paged cache does"
                " not tell where each begins; leave out what goes by positions, or use generate()."
            )
        if hasattr(value, "get_seq_length"):
            length = value.get_seq_length(layer)
            # A static cache counts in place.
            return length.clone() if isinstance(length, Tensor) else length
    return 0
