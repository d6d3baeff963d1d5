"""The state of torch's default random generators: `noise` and `shuffle` draw from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

CPU = "cpu"


def generator_states(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """The state of the CPU's generator and of those of other devices, by device: (N,) uint8."""
    states = {CPU: torch.get_rng_state()}
    for device in devices:
        if device.type not in (CPU, "meta"):
            states[str(device)] = torch.get_device_module(device).get_rng_state(*_which(device))
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Put generators in the states that `generator_states` has found."""
    for name, state in states.items():
        if name == CPU:
            torch.set_rng_state(state)
        else:
            device = torch.device(name)
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one of these only
