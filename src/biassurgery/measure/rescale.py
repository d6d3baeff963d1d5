"""How a model's residual stream is made smaller: found, tried and compared on the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation
from biassurgery.measure.reading import reading
from biassurgery.measure.scaled_weights import found_weights, refused
from biassurgery.measure.seen_forward import Forward, epsilon_of, forward
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.rescale import CONFIG_KEY, RescaleEdit, Setting, Weight

# The largest difference from the model as it was, of the largest of a channel or of the logits.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Plan:
    """What rescaling a model consists of.

    Attributes:
        edit: puts it on, and takes it off.
        error: the largest difference of the trial's outputs, over the largest magnitude.
        saved_error: the same of the model that a checkpoint gives back: eps of its norms are as
            they were, where its config has no number for those that read the stream alone.
        peaks: the largest magnitude that goes into or comes out of each module afterwards, the
            largest first; inside branches rescaling changes nothing.
        norm: of all that is multiplied, afterwards, by which that is told later.
    """

    edit: RescaleEdit
    error: float
    saved_error: float
    peaks: dict[str, float]
    norm: float


def planned(host: Host, factor: float, batch: Mapping[str, Any]) -> Plan:
    """How to multiply the residual stream by a factor, shown to be right on one batch.

    Raises:
        UnsupportedModel: the stream meets something that is not scale-free, or what would be
            multiplied cannot be; the message says what.
        NonFiniteActivation: the model's own numbers are not finite.
    """
    with reading(host.root):
        weights = found_weights(host, factor, batch)
        before = forward(host, batch)
        _check_finite(host, before)
        edit = RescaleEdit(factor, weights, tower=host.tower)
        with attached([Place(None, host.root, edit)]):
            saved = forward(host, batch)
        settings, config = _epsilons(host, before, saved, factor)
        edit = RescaleEdit(factor, weights, settings, config, _part(host), host.tower)
        with attached([Place(None, host.root, edit)]):
            after = forward(host, batch)
            norm = _norm(host.root, weights, factor)
    error = check_same(host, before, after, factor)
    is_saved = len(config) > 1 or not settings
    saved_error = error if is_saved else output_error(before, saved, factor)
    peaks = dict(sorted(after.peaks.items(), key=lambda item: -item[1]))
    return Plan(edit, error, saved_error, peaks, norm)


def adopted(
    host: Host, factor: float, batch: Mapping[str, Any], norms: list[tuple[str, str]], key: str
) -> RescaleEdit:
    """The edit of a model that was loaded with its weights multiplied: it takes that off.

    Args:
        host: the model.
        factor: by which it was rescaled.
        batch: shows which weights.
        norms: those that read the stream, each with its attribute.
        key: the name of their eps in the config, where that was changed; else empty.
    """
    with reading(host.root):
        weights = found_weights(host, factor, batch)
    # A state dict that was loaded by itself came without the config.
    has_config = hasattr(getattr(host.model, "config", None), CONFIG_KEY)
    square = 1 / factor**2 if key and has_config else factor**2

    def scaled(eps: float) -> tuple[float, float]:
        return (eps * square, eps) if key and has_config else (eps, eps * square)

    settings = [
        Setting(name, attribute, *scaled(getattr(host.root.get_submodule(name), attribute)))
        for name, attribute in norms
    ]
    config: dict[str, tuple[float | None, float]] = {CONFIG_KEY: (None, factor)}
    if key:
        config[key] = scaled(getattr(host.model.config, key))
    part = _part(host)
    return RescaleEdit(
        factor, weights, settings, {} if part is None else config, part, host.tower, adopted=True
    )


def norm_now(host: Host, factor: float, batch: Mapping[str, Any]) -> float:
    """`Plan.norm` as it is now, whether what would be multiplied has been or not."""
    with reading(host.root):
        return _norm(host.root, found_weights(host, factor, batch), factor)


def _epsilons(
    host: Host, before: Forward, after: Forward, factor: float
) -> tuple[list[Setting], dict[str, tuple[float | None, float]]]:
    """The eps of norms that read the stream, and what the config says after that.

    A config has one number for all norms; where some read something else, it stays as it is.

    Args:
        host: the model.
        before, after: the trial, and with the weights multiplied.
        factor: by which.
    """
    modules = dict(host.root.named_modules())
    settings = []
    for short in before.norms:
        name = _in_root(host, short)
        attribute = epsilon_of(modules[name])
        if attribute is not None and _reads_stream(short, before, after, factor):
            eps = getattr(modules[name], attribute)
            settings.append(Setting(name, attribute, eps, eps * factor**2))
    if _part(host) is None:
        return settings, {}
    config: dict[str, tuple[float | None, float]] = {CONFIG_KEY: (None, factor)}
    numbers = {setting.before for setting in settings}
    keys = [
        key
        for key, value in vars(host.model.config).items()
        if "eps" in key and isinstance(value, float) and {value} == numbers
    ]
    if len(settings) == len(before.norms) and len(keys) == 1:
        eps = getattr(host.model.config, keys[0])
        config[keys[0]] = (eps, eps * factor**2)
    return settings, config


def _reads_stream(norm: str, before: Forward, after: Forward, factor: float) -> bool:
    """Whether what a norm reads has become about a factor times what it was."""
    was, now = before.norms[norm], after.norms[norm]
    if not was or not now:
        return False
    return abs(math.log2(now / was / factor)) < abs(math.log2(factor)) / 2


def check_same(host: Host, before: Forward, after: Forward, factor: float) -> float:
    """The largest difference between what a model says before and after, where it is small.

    Raises:
        UnsupportedModel: it is not.
    """
    tolerance = TOLERANCES.get(before.dtype, 1e-2)
    for layer, (was, now) in enumerate(zip(before.hidden, after.hidden)):
        off = channel_error(now, was * factor)
        if not off <= tolerance:
            raise refused(
                host,
                f"is off by {off:.2g} behind block {layer}, which reads it without a norm in front,"
                " or adds to it what has no weights of its own",
            )
    error = output_error(before, after, factor)
    if not error <= tolerance:
        raise refused(
            host, f"changes the output by {error:.2g} of its largest value (at most {tolerance:g})"
        )
    return error


def output_error(before: Forward, after: Forward, factor: float) -> float:
    """The largest difference of what a model returns, over the largest magnitude.

    Hidden states, where it returns such, may be times the factor, or over it.
    """
    errors = []
    for name, was in before.outputs.items():
        scales = (1.0,) if name == "logits" else (1.0, factor, 1 / factor)
        errors.append(min(_error(after.outputs[name], was * scale) for scale in scales))
    return max(errors, default=0.0)


def channel_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of hidden states (B, T, D), over the largest of its channel.

    And over the median magnitude of all, where that is larger.
    """
    scale = wanted.abs().amax((0, 1)).clamp(min=wanted.abs().median())
    return ((found - wanted).abs() / scale.clamp(min=1e-30)).max().item()


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def _check_finite(host: Host, seen: Forward) -> None:
    values: Iterable[Tensor] = (*seen.hidden, *seen.outputs.values())
    if not all(bool(value.isfinite().all()) for value in values):
        raise NonFiniteActivation(
            f"model: {type(host.root).__name__} gives NaN or infinity on the trial; load it in"
            " float32 or bfloat16, rescale, then cast."
        )


def _part(host: Host) -> str | None:
    """The name of what is operated on, where it has a config that would be saved."""
    if not hasattr(getattr(host.model, "config", None), "to_dict"):
        return None
    return _in_root(host, "")


def _in_root(host: Host, name: str) -> str:
    """The name in the whole model of a module of the part that is operated on."""
    part = next(n for n, module in host.root.named_modules() if module is host.model)
    return ".".join(filter(None, (part, name)))


def _norm(root: nn.Module, weights: list[Weight], factor: float) -> float:
    """The norm of all that is multiplied by the factor itself."""
    norms = [
        root.get_submodule(weight.module).get_parameter(weight.name).detach().double().norm()
        for weight in weights
        if weight.factor == factor and not weight.plus_one
    ]
    return torch.stack(norms).norm().item()
