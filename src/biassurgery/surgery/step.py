"""One block of a model run by itself, in a forward of the model's own that ends behind it.

What a block is given besides the residual stream (masks, rotations, positions) is what the model's
own forward gives it. So each step is a forward: the blocks before the one that is to run do
nothing, the last of them answers with what it has returned before, and those behind are not
reached. Whatever else blocks hand on is not a number, and is refused where it arrives:

    block          0        1        2        3 (to run)     4
    returns        NaN      NaN      kept     computed       is not reached
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import Edit, Place
from biassurgery.surgery.swap import Swapped

# What a block may be given besides tensors: nothing in which it could leave something for others.
_PLAIN = (Tensor, str, bytes, int, float, complex, torch.dtype, torch.device, type(None))


# Of a module: what brings and drops offloaded weights changes them.
_OF_TORCH = ("_parameters", "_buffers", "_modules")


class Through(BaseException):
    """The block that a forward was for has run; no error, so that no host takes it for one."""


class SteppedBlock(Swapped):
    """Mixed in front of a block's class, outside of all others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for edit in self.children_of(StepEdit):
            if edit.layer < edit.step.layer:
                return edit.step.answer(edit.layer, args, kwargs)
            edit.step.arrive(edit.layer, args, kwargs)
            before = _attributes(self) if edit.step.is_first else []
            output = super().forward(*args, **kwargs)
            edit.step.check_kept_nothing(before)
            return edit.step.leave(output)
        return super().forward(*args, **kwargs)


class StepEdit(Edit):
    """Lets a block run where its turn has come."""

    child = "one_step"
    mixin = SteppedBlock

    def __init__(self, layer: int, step: Step) -> None:
        super().__init__()
        self.layer = layer
        self.step = step


class Step:
    """Which block is to run, and what the one before it has returned.

    Attributes:
        layer: of the block that is to run.
        is_first: whether this is the first forward for that block.
        forms: by layer, what its output is besides the residual stream: the name of its type
            (tuple, list), and of each further element whether it is a tensor; None: the output is
            a tensor.
        caching: whether the block may be given a cache of keys and values.
        cache: the one that it was given; None: none.
    """

    def __init__(self, caching: bool = False) -> None:
        self.layer = 0
        self.caching = caching
        self.cache: Any = None
        self.is_first = True
        self.forms: dict[int, tuple[str, list[bool]] | None] = {}
        self._kept: Tensor | None = None
        self._goes_on = False
        self._seen: set[int] = set()
        self._output: Tensor | None = None

    def places(self, blocks: Iterable[nn.Module]) -> list[Place]:
        """An edit on every block; to be attached behind all others."""
        return [Place(i, block, StepEdit(i, self)) for i, block in enumerate(blocks)]

    def begin(self, layer: int, kept: Tensor | None, is_first: bool, is_last: bool) -> None:
        """A forward is about to start.

        Args:
            layer: of the block that is to run.
            kept: what the block before it has returned; None: there is none before it.
            is_first: whether this is the first forward for that block.
            is_last: whether the block is the last one. The first forward for it goes on behind it,
                where looped blocks would begin anew.
        """
        self.layer = layer
        self.is_first = is_first
        self._kept = kept
        self._goes_on = is_first and is_last
        self._seen.clear()
        self._output = None
        self.cache = None

    def take(self) -> Tensor:
        """What the block has returned: the residual stream in the host's layout.

        Raises:
            UnsupportedModel: it did not run.
        """
        output = self._output
        self._output = self._kept = None
        if output is None:
            raise UnsupportedModel(
                f"model: block {self.layer} did not run when the model was run as far as that;"
                " leave onload= out."
            )
        return output

    def answer(self, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a block before the one that is to run returns."""
        self._once(layer)
        assert self._kept is not None  # there is a block before the one that is to run
        given: Any = args[0] if args else kwargs.get("hidden_states")
        hidden: Tensor = self._kept
        if layer < self.layer - 1:  # not a number, from the first block on
            handed_on = layer > 0 and isinstance(given, Tensor)
            hidden = given if handed_on else torch.full_like(hidden, torch.nan)
        form = self.forms[layer]
        if form is None:
            return hidden
        kind, tensors = form
        nothing = hidden.new_full((), torch.nan)
        output = (hidden, *(nothing if is_tensor else None for is_tensor in tensors))
        return list(output) if kind == "list" else output

    def arrive(self, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check what the block that is to run is given."""
        self._once(layer)
        if layer > self.layer:
            raise UnsupportedModel(
                f"model: block {self.layer} did not run, and block {layer} does; blocks that are"
                " passed over cannot be run one at a time. Leave onload= out."
            )
        for value in _leaves((*args, *kwargs.values())):
            if self.caching and hasattr(value, "get_seq_length"):
                self.cache = value
            elif not isinstance(value, _PLAIN):
                raise UnsupportedModel(
                    f"model: block {layer} is given a {type(value).__name__}, in which one block"
                    " may leave something for another, so that they cannot be run one at a time;"
                    " leave onload= out."
                )
            elif layer and isinstance(value, Tensor) and value.is_floating_point():
                self._check_number(layer, value)

    def check_kept_nothing(self, before: list[tuple[nn.Module, str, Any, list[Any]]]) -> None:
        """Refuse a block that has changed attributes of its modules, which others may read.

        By then they would be those of the last batch.
        """
        for module, name, value, items in before:
            now = vars(module).get(name)
            if now is not value or not _same(_items(now), items):
                raise UnsupportedModel(
                    f"model: block {self.layer} changes {name!r} of its {type(module).__name__} as"
                    " it runs, by which it may hand something on to another block, so that they"
                    " cannot be run one at a time; leave onload= out."
                )

    def leave(self, output: Any) -> Any:
        """Keep what the block has returned, and end the forward."""
        hidden = output if isinstance(output, Tensor) else None
        self.forms[self.layer] = None
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            hidden = output[0]
            others = output[1:]
            if all(isinstance(other, (Tensor, type(None))) for other in others):
                tensors = [isinstance(other, Tensor) for other in others]
                self.forms[self.layer] = (type(output).__name__, tensors)
            else:
                hidden = None
        if hidden is None:
            raise UnsupportedModel(
                f"model: block {self.layer} returns a {type(output).__name__} whose parts are not"
                " all tensors, so that blocks cannot be run one at a time; leave onload= out."
            )
        self._output = hidden
        if not self._goes_on:
            raise Through
        return output

    def _once(self, layer: int) -> None:
        if layer in self._seen:
            raise UnsupportedModel(
                f"model: block {layer} ran twice in one forward, so it has no one output; looped"
                " layers cannot be measured."
            )
        self._seen.add(layer)

    @staticmethod
    def _check_number(layer: int, value: Tensor) -> None:
        """Refuse what only blocks that did not run could have made."""
        if value.isnan().any():
            raise UnsupportedModel(
                f"model: block {layer} is given more of the blocks before it than the residual"
                " stream, so that they cannot be run one at a time; leave onload= out."
            )


def _attributes(block: nn.Module) -> list[tuple[nn.Module, str, Any, list[Any]]]:
    """What the modules of a block have as attributes, and what is in those that are containers.

    Edits keep what they see, and that is asked of them.
    """
    return [
        (module, name, value, _items(value))
        for module in block.modules()
        if not isinstance(module, Edit)
        for name, value in vars(module).items()
        if name not in _OF_TORCH
    ]


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set)) else []


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right))


def _leaves(value: Any) -> Iterable[Any]:
    """The arguments of a block, one by one; those in tuples and lists too."""
    if type(value) in (tuple, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
