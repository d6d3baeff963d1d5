"""How one block is changed: its class becomes a subclass that edits the block's output, and back again.

A class swap keeps state-dict keys, `isinstance`, forward hooks and the block object itself, and `torch.compile` sees it (a guard on
the type fails and the block is compiled anew), where a forward hook added later would be ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType, new_class
from typing import Any

from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel

NAME = "activation_edits"  # the child of an edited block that holds its edits, in order of application


class Edit(nn.Module):
    """Changes a hidden state (B, T, D). Buffers keep their dtype whatever the model is cast to, and are in no state dict.

    Attributes:
        width: channels of the hidden states that it is made for; None: it does not matter.
        layout: the axes of what its block returns, see `Adapter.layout`.
        cache_layer: where `start` is needed, the number of tokens of the sequence that are in the cache already: the layer that is edited.
    """

    width: int | None = None
    layout: str = "BTD"
    cache_layer: int | None = None

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        raise NotImplementedError  # abstract

    def _apply(self, fn: Any, recurse: bool = True) -> Edit:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer if moved.is_meta else buffer.to(moved.device)
        return self


class EditedBlock(nn.Module):
    """Mixed in front of a block's class: the block's own forward, then the edits."""

    activation_edits: nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        edits = edits_of(self)
        layer = next((edit.cache_layer for edit in edits if edit.cache_layer is not None), None)
        start = 0 if layer is None else cached_tokens(layer, args, kwargs)
        output = super().forward(*args, **kwargs)  # type: ignore[reportCallIssue]
        layout = edits[0].layout if edits else "BTD"
        hidden = hidden_of(output, layout)
        for edit in edits:
            if edit.width not in (None, hidden.shape[-1]):
                raise UnsupportedModel(f"model: a block returned a hidden state of {hidden.shape[-1]} channels where its adapter says "
                                       f"{edit.width}; unpatch the model and register an adapter with the right width.")
            hidden = edit(hidden, start)
        return with_hidden(output, hidden, layout)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(2)
        return _new_edited, (host_class(self),), *state


@functools.cache
def edited_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a block class that applies edits, of the same name: accelerate knows by name what it must not split."""
    return new_class(host.__name__, (EditedBlock, host), exec_body=lambda body: body.update(__module__=__name__))


def host_class(block: nn.Module) -> type[nn.Module]:
    """The class that the block has without edits."""
    return type(block).__mro__[2] if _on_top(block) else type(block)


def _on_top(block: nn.Module) -> bool:
    """Whether the block's class is one of ours, not a subclass of it."""
    return type(block).__bases__[0] is EditedBlock


def _new_edited(host: type[nn.Module]) -> nn.Module:
    cls = edited_class(host)
    return cls.__new__(cls)


def edits_of(block: nn.Module) -> tuple[Edit, ...]:
    """The edits on a block, in order of application."""
    return tuple(block._modules[NAME]) if isinstance(block, EditedBlock) else ()  # type: ignore[arg-type]


def check(block: nn.Module, layer: int) -> None:
    """Raise `UnsupportedModel` if the class of this block would not decide how it runs."""
    if "forward" in vars(block) and "_old_forward" not in vars(block) and not _bound(block):
        raise UnsupportedModel(f"model: `forward` of block {layer} was replaced on the object itself, which hides any change of its "
                               "class; delete that attribute, patch, then put it back around the patched one.")
    if NAME in block._modules and not isinstance(block, EditedBlock):
        raise UnsupportedModel(f"model: block {layer} has a child named {NAME!r} of its own; rename it first.")


def attach(block: nn.Module, edit: Edit) -> None:
    """Append an edit to a block."""
    if not isinstance(block, EditedBlock):
        _set_class(block, edited_class(type(block)))  # first, for only this can fail
        block.add_module(NAME, nn.ModuleList())
    block._modules[NAME].append(edit)  # type: ignore[union-attr, operator]


def detach(block: nn.Module, edit: Edit) -> None:
    """Remove an edit; with the last one the block gets its own class back, unless another library (FSDP2) has subclassed ours since."""
    if not isinstance(block, EditedBlock):
        return
    left = [e for e in edits_of(block) if e is not edit]
    block._modules[NAME] = nn.ModuleList(left)
    if not left and _on_top(block):
        _set_class(block, host_class(block))
        del block._modules[NAME]


def _bound(block: nn.Module) -> bool:
    """Whether the object has only its class's `forward`, bound, as transformers 4 leaves it there after `output_hidden_states=True`."""
    forward = vars(block).get("forward")
    return isinstance(forward, MethodType) and forward.__self__ is block and forward.__func__ is type(block).forward


def _set_class(block: nn.Module, cls: type[nn.Module]) -> None:
    bound = _bound(block)
    block.__class__ = cls
    if bound:
        block.forward = MethodType(cls.forward, block)
    if "_old_forward" in vars(block):  # accelerate calls the forward that it found when its hook was added
        block._old_forward = MethodType(cls.forward, block)  # type: ignore[assignment]


def hidden_of(output: Any, layout: str = "BTD") -> Tensor:
    """The hidden state (B, T, D) in what a block returned: the output itself or its first element, its axes put in order.

    Args:
        output: a tensor, or a tuple, list or mapping (ModelOutput) that begins with one.
        layout: the axes of that tensor, see `Adapter.layout`; S parallel streams are read as one of S * D channels.

    Raises:
        UnsupportedModel: there is no tensor with so many axes in that place.
    """
    hidden = output
    if isinstance(output, (tuple, list, Mapping)):
        hidden = next(iter(output.values() if isinstance(output, Mapping) else output), None)
    if not isinstance(hidden, Tensor) or hidden.dim() != len(layout):
        found = f"a tensor {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UnsupportedModel(f"model: a block returned {found} where a hidden state ({', '.join(layout)}) was expected; unpatch the "
                               "model and register an adapter whose blocks return one.")
    return hidden if layout == "BTD" else hidden.permute(_axes(layout)).flatten(2)


def with_hidden(output: Any, hidden: Tensor, layout: str = "BTD") -> Any:
    """What a block returned, of the same type and layout, with another hidden state (B, T, D) in it."""
    if isinstance(output, Tensor):
        return hidden if layout == "BTD" else _laid_out(hidden, output, layout)
    if isinstance(output, Mapping):
        name = next(iter(output))
        return type(output)(**{**output, name: with_hidden(output[name], hidden, layout)})
    values = (with_hidden(output[0], hidden, layout), *output[1:])
    if isinstance(output, list):
        return list(values)
    return type(output)._make(values) if hasattr(output, "_make") else values  # a named tuple or a plain one


def _axes(layout: str) -> list[int]:
    """Where the axes B, T, (S,) D are in a layout."""
    return [layout.index(axis) for axis in "BTSD" if axis in layout]


def _laid_out(hidden: Tensor, like: Tensor, layout: str) -> Tensor:
    """A hidden state (B, T, D) back in the layout and shape of `like`."""
    axes = _axes(layout)
    return hidden.reshape([like.shape[axis] for axis in axes]).permute([axes.index(axis) for axis in range(len(axes))]).contiguous()


def cached_tokens(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | Tensor:
    """How many tokens of the sequence the cache given to a block holds for this layer before the block runs."""
    for value in (*kwargs.values(), *args):
        if hasattr(value, "get_seq_length"):
            length = value.get_seq_length(layer)
            return length.clone() if isinstance(length, Tensor) else length  # a static cache counts in place
    return 0
