"""Weights times a factor: a change of a whole model that leaves no code in its forward."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import Edit
from biassurgery.surgery.own_config import Held, configs_in, give_own, put
from biassurgery.surgery.swap import Swapped

CONFIG_KEY = "biassurgery_rescale"  # in the config of what is rescaled: its factor


class Weight(NamedTuple):
    """A weight that is multiplied: where it is, by what, and whether it is stored as w of 1 + w."""

    module: str
    name: str
    factor: float
    plus_one: bool = False

    @property
    def key(self) -> str:
        """Its name in a state dict."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def size(self, tensor: Tensor) -> float:
        """The norm of what the model multiplies by."""
        return float((1 + tensor if self.plus_one else tensor).double().norm())

    def times(self, tensor: Tensor) -> Tensor:
        """The weight multiplied."""
        if not self.plus_one:
            return tensor * self.factor
        return ((1 + tensor.double()) * self.factor - 1).to(tensor.dtype)

    def over(self, tensor: Tensor) -> Tensor:
        """The inverse of `times`, exact where no number is too small for its dtype."""
        return self._replace(factor=1 / self.factor).times(tensor)


class Setting(NamedTuple):
    """An attribute of a module that becomes another number."""

    module: str
    name: str
    before: float
    after: float


class Rescaled(Swapped):
    """The class of a model with scaled weights: its own, but for what it loads."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        for edit in self.children_of(RescaleEdit):
            edit.check_state(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)


class RescaleEdit(Edit):
    """Multiplies weights for as long as it is on, and then gives them back bitwise.

    A weight that cannot be divided exactly is kept, at the price of its memory. Each is replaced by
    one assignment, with what it was at hand until then, so that attaching and detaching may be
    interrupted at any line and repeated.

    Args:
        factor: of the residual stream.
        weights: what is multiplied for that.
        settings: numbers of the model's norms.
        config: numbers for the config of what is rescaled, by name: before (None: it is not there)
            and after.
        part: the name of the module that has that config; None: there is none.
        tower: which tower of the model is rescaled; None: it has one only.
        adopted: whether the model comes with all that, from a checkpoint, so that it is only to be
            taken off.
    """

    child = "rescale"
    several = True
    mixin = Rescaled

    def __init__(
        self,
        factor: float,
        weights: Sequence[Weight],
        settings: Sequence[Setting] = (),
        config: dict[str, tuple[float | None, float]] | None = None,
        part: str | None = None,
        tower: str | None = None,
        adopted: bool = False,
    ) -> None:
        super().__init__()
        self.residual_factor = factor
        self.weights = tuple(weights)
        self.settings = tuple(settings)
        self.config = config or {}
        self.part = part
        self.tower = tower
        self.adopted = adopted
        self._forget()

    def attach(self, module: nn.Module) -> None:
        if module._modules.get(self.child) is self:
            return
        self._forget()
        super().attach(module)
        try:
            with torch.no_grad():
                for weight in self.weights:
                    self._multiply(_parameter(module, weight), weight)
            for name, attribute, before, after in self.settings:
                self._set(module.get_submodule(name), attribute, before, after)
            if self.part is not None:
                self._held = configs_in(module)
                give_own(module, self._held)
                config = module.get_submodule(self.part).config
                for name, (before, after) in self.config.items():
                    self._set(config, name, before, after)
        except BaseException:
            self.detach(module)
            raise

    def detach(self, module: nn.Module) -> None:
        if module._modules.get(self.child) is not self:
            return
        with torch.no_grad():
            for weight in list(self._before):
                self._give_back(_parameter(module, weight), weight)
        for thing, name, before in self._numbers:
            _restore(thing, name, before)
        before = [held.config for held in self._held if held[:2] == ("", "config")]
        if before and module.config == before[0]:  # else the user has changed it meanwhile
            put(module, self._held)
        super().detach(module)

    def check(self, module: nn.Module) -> None:
        """Raise `UnsupportedModel` if a weight is not there to be divided, or not the only one."""
        for weight in self.weights:
            holder = module.get_submodule(weight.module)
            if type(holder).__module__.startswith("peft."):
                raise UnsupportedModel(
                    f"model: {weight.module} has got an adapter of PEFT since the model was"
                    " rescaled, and what that writes is made for the rescaled stream; merge it"
                    " (model.merge_and_unload()) or take it off (model.unload()), then unpatch."
                )
            data = _parameter(module, weight).data
            if data.is_meta or type(data) is not Tensor or not data.dtype.is_floating_point:
                raise UnsupportedModel(
                    f"model: {weight.module}.{weight.name} is offloaded, sharded or quantised now,"
                    " and cannot be divided by its factor; bring it back as it was when the model"
                    " was rescaled, or load the original checkpoint."
                )

    def check_state(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Raise `UnsupportedModel` if a state dict is of the model before it was rescaled.

        It would run almost as it should, its norms scaled and its weights not, and unpatching would
        divide what had not been multiplied. Weights tell by their size: about that of those that
        are there, or 1 / factor times as large.
        """
        shares = [
            math.log(weight.size(state[weight.key]) / present, 1 / weight.factor)
            for weight in self.weights
            if isinstance(state.get(weight.key), Tensor)
            and not state[weight.key].is_meta
            and (present := weight.size(_parameter(module, weight).detach()))
            and weight.size(state[weight.key])
        ]
        if shares and statistics.median(shares) > 0.5:
            raise UnsupportedModel(
                f"state_dict: it has the weights of the model before it was rescaled by"
                f" {self.residual_factor:g}, and would undo that for some of it;"
                " unpatch_model(model, 'rescale'), load it, and rescale the model again."
            )

    def _forget(self) -> None:
        # Of each weight what it was, None being this over the factor; and what it is to be again.
        self._before: dict[Weight, Tensor | None] = {}
        self._after: dict[Weight, Tensor] = {}
        self._numbers: list[tuple[Any, str, float | None]] = []
        self._held: list[Held] = []

    def _multiply(self, parameter: nn.Parameter, weight: Weight) -> None:
        if self.adopted:
            self._before[weight] = None
            return
        before = parameter.data
        after = weight.times(before)
        self._before[weight] = before
        parameter.data = after
        if torch.equal(weight.over(after), before):
            self._before[weight] = None

    def _give_back(self, parameter: nn.Parameter, weight: Weight) -> None:
        if weight not in self._after:
            self._after[weight] = _divided(parameter.data, weight, self._before[weight])
        parameter.data = self._after[weight]
        del self._before[weight]

    def _set(self, thing: Any, name: str, before: float | None, after: float) -> None:
        self._numbers.append((thing, name, before))
        setattr(thing, name, after)


def residual_factor(root: nn.Module, model: nn.Module, tower: str | None) -> float:
    """By what the residual stream of a model has been multiplied; 1.0: by nothing.

    Args:
        root: the whole model.
        model: what of it is operated on.
        tower: which of its towers that is.
    """
    for edit in root.children():
        if isinstance(edit, RescaleEdit) and edit.tower == tower:
            return edit.residual_factor
    return float(getattr(getattr(model, "config", None), CONFIG_KEY, 1.0))


def _parameter(model: nn.Module, weight: Weight) -> nn.Parameter:
    return model.get_submodule(weight.module).get_parameter(weight.name)


def _divided(tensor: Tensor, weight: Weight, before: Tensor | None) -> Tensor:
    """What a weight was: as it was kept, unless it has changed since."""
    if before is not None:
        kept = before.to(tensor.device)
        if torch.equal(kept.to(tensor.dtype), tensor):  # interrupted before it was multiplied
            return tensor
        if torch.equal(weight.times(kept).to(tensor.dtype), tensor):
            return kept.to(tensor.dtype)
    return weight.over(tensor)


def _restore(thing: Any, name: str, before: float | None) -> None:
    if before is not None:
        setattr(thing, name, before)
    elif name in vars(thing):
        delattr(thing, name)
