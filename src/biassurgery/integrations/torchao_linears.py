"""The linear layers of a model, and what torchao makes of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.linears import Linear, linears
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, MissingPackage, UnsupportedModel
from biassurgery.measure.reading import reading
from biassurgery.surgery.edit import edits_of

_OLDEST = (0, 18)  # 0.17 has no use_running_absmax of SmoothQuant, 0.16 no two granularities
_LEVELS = 127
_LEAST = 1e-12


class Layers:
    """The linear layers that torchao is to quantise.

    Conversion is of copies that share the parameters, which take the places of the layers in the
    model; so the layers themselves can come back, all of them, at any exception.

    Args:
        host: the model.
        static: the layers with one scale for all data.
        per_token: those with one scale a token.
        ignored: those that stay.
    """

    def __init__(
        self, host: Host, static: list[Linear], per_token: list[Linear], ignored: list[Linear]
    ) -> None:
        self.host = host
        self.static = static
        self.per_token = per_token
        self.ignored = ignored
        self.ao: Any = _torchao()

    @classmethod
    def of(cls, host: Host, ignore: Collection[str], per_token: Collection[str]) -> Layers:
        """The layers, told apart by names or their endings.

        Raises:
            BadOption: a name that no linear layer has.
            UnsupportedModel: a layer that torchao does not quantise, or that is quantised.
        """
        every = linears(host)
        left = _named("ignore", ignore, every)
        dynamic = _named("per_token", per_token, every) - left
        for name, _, module in every:
            weight = getattr(module, "weight", None)
            if name not in left and (
                not isinstance(module, nn.Linear) or type(weight) is not nn.Parameter
            ):
                raise UnsupportedModel(
                    f"model: {name} is a {type(module).__name__} with a weight of type"
                    f" {type(weight).__name__}, and torchao quantises nn.Linear in floating point;"
                    " leave it out by ignore=, or pass the model before it was quantised."
                )
            if name not in left and edits_of(module):
                raise UnsupportedModel(
                    f"model: a patch is on {name} itself, which conversion would lose;"
                    " unpatch_model(model) first."
                )
        return cls(
            host,
            [each for each in every if each.name not in left | dynamic],
            [each for each in every if each.name in dynamic],
            [each for each in every if each.name in left],
        )

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Within the block copies stand in for the layers; at an exception these come back."""
        try:
            for name, _, module in (*self.static, *self.per_token):
                _put(self.host.root, name, _twin(module))
            yield
        except BaseException:
            self._put_originals()
            raise

    @contextmanager
    def in_floats(self) -> Iterator[None]:
        """Within the block the layers themselves run, converted ones or not."""
        converted = {
            each.name: self.host.root.get_submodule(each.name)
            for each in (*self.static, *self.per_token)
        }
        self._put_originals()
        try:
            yield
        finally:
            for name, module in converted.items():
                _put(self.host.root, name, module)

    def _put_originals(self) -> None:
        for name, _, module in (*self.static, *self.per_token):
            _put(self.host.root, name, module)

    def convert(self, largest: Mapping[str, float], axes: Mapping[str, int]) -> None:
        """Quantise every layer by a configuration of its own."""
        configs: dict[str, Any] = {each.name: self._dynamic() for each in self.per_token}
        for name, _, module in self._that_ran(largest):
            configs[name] = self.ao.Int8StaticActivationInt8WeightConfig(
                act_quant_scale=_scale(module, largest[name], axes[name]),
                granularity=[self.ao.PerTensor(), self.ao.PerRow()],
                set_inductor_config=False,
            )
        config = self.ao.FqnToConfig(OrderedDict(configs))
        self.ao.quantize_(self.host.root, config, filter_fn=None)

    def set_scales(self, largest: Mapping[str, float], axes: Mapping[str, int]) -> None:
        """Let the static scales of converted layers reach to these magnitudes."""
        for name, _, module in self._that_ran(largest):
            weight: Any = self.host.root.get_submodule(name).weight
            weight.act_quant_scale = _scale(module, largest[name], axes[name])

    def factors(self) -> dict[str, Tensor]:
        """By name, what smoothed layers multiply the channels of their inputs by."""
        found = {}
        for each in self.static:
            weight: Any = self.host.root.get_submodule(each.name).weight
            if getattr(weight, "act_pre_scale", None) is not None:
                found[each.name] = weight.act_pre_scale
        return found

    def smooth(self, batches: Iterable[dict[str, Any]], strength: float) -> None:
        """Convert by torchao's SmoothQuant; static scales are still to be set."""
        from torchao.prototype.smoothquant import SmoothQuantConfig

        both = [
            (self._dynamic(self.ao.PerTensor()), _is_one_of(self.static)),
            (self._dynamic(), _is_one_of(self.per_token)),
        ]

        def take(step: str) -> None:
            for base, among in both:
                options: Any = {"step": step, "alpha": strength, "use_running_absmax": True}
                config = SmoothQuantConfig(base, **options)
                self.ao.quantize_(self.host.root, config, filter_fn=among)

        take("prepare")
        with reading(self.host.model):
            for batch in batches:
                self.host.adapter.run(self.host.model, batch)
        take("prepare_for_smoothquant_smoothing_factor")
        take("convert")

    def _dynamic(self, granularity: Any = None) -> Any:
        """One scale a token or, `PerTensor()`, a forward."""
        return self.ao.Int8DynamicActivationInt8WeightConfig(
            granularity=[granularity or self.ao.PerRow(), self.ao.PerRow()],
            set_inductor_config=False,
        )

    def _that_ran(self, largest: Mapping[str, float]) -> list[Linear]:
        silent = [each.name for each in self.static if each.name not in largest]
        if silent:
            raise BadOption(
                f"batches: {silent[0]} did not run on them, so its range is not known; give data of"
                " the kind that it reads, or ignore it."
            )
        return self.static


def _torchao() -> Any:
    try:
        import torchao.quantization as ao
    except ImportError as error:
        raise MissingPackage(
            f"torchao: it cannot be imported ({error}); pip install torchao, in the version for"
            f" torch {torch.__version__}."
        ) from error
    installed = version("torchao")
    if tuple(map(int, installed.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise MissingPackage(
            f"torchao: version {installed} lacks options of static int8 or of SmoothQuant that are"
            f" used here; pip install 'torchao>={oldest}'."
        )
    return ao


def _named(argument: str, given: Collection[str], every: list[Linear]) -> set[str]:
    """The layers whose names are given, or end so."""
    if isinstance(given, str) or not all(isinstance(entry, str) for entry in given):
        raise BadOption(f"{argument}: {given!r}; give a list of names of linear layers.")
    found: set[str] = set()
    for entry in given:
        own = {each.name for each in every if f".{each.name}".endswith(f".{entry}")}
        if not own:
            raise BadOption(
                f"{argument}: {entry!r} is no linear layer in the blocks, and none ends so; their"
                f" names are like {every[-1].name!r}."
            )
        found |= own
    return found


def _twin(module: nn.Module) -> nn.Module:
    """Another module with the same parameters."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    return twin


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = module


def _scale(module: nn.Module, largest: float, axes: int) -> Tensor:
    """One scale for a tensor of so many axes, as torchao wants it."""
    weight: Any = module.weight
    value = max(largest, _LEAST) / _LEVELS
    return torch.full((1,) * axes, value, dtype=torch.float32, device=weight.device)


def _is_one_of(layers: list[Linear]) -> Callable[[nn.Module, str], bool]:
    names = {each.name for each in layers}
    return lambda module, name: name in names
