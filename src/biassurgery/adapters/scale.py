"""By what the residual stream of a model has been multiplied (mode `rescale`)."""

from __future__ import annotations

from typing import Protocol, TypeVar

from biassurgery.adapters.registry import Host
from biassurgery.errors import warn
from biassurgery.surgery.rescale import residual_factor

Self = TypeVar("Self", bound="InUnits")


class InUnits(Protocol):
    """A finding in units of the residual stream."""

    def of_factor(self: Self, factor: float) -> Self:
        """The same with the stream times a factor."""
        ...


def scale_of(host: Host) -> float:
    """The factor that a patch, or the config of a saved model, says; 1.0: by nothing."""
    return residual_factor(host.root, host.model, host.tower)


def in_units_of(host: Host, argument: str, finding: Self) -> Self:
    """A finding of a model before or after it was rescaled, in the units of this one; says so."""
    factor = scale_of(host)
    warn(
        f"{argument}: they were measured on the model with another factor of `rescale` than its"
        f" {factor:g}, and are converted.",
    )
    return finding.of_factor(factor)


def warn_of_scale(host: Host, what: str) -> None:
    """Warn that what is measured is of hidden states that a factor has changed."""
    factor = scale_of(host)
    if factor != 1:
        warn(
            f"model: it is rescaled by {factor:g}: what it says is as before, but {what} are that"
            " many times what they were; unpatch_model(model, 'rescale') for the model's own.",
        )
