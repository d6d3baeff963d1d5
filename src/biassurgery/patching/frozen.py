"""What a patch keeps from training."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch.nn import Parameter


class Frozen:
    """Parameters that a patch keeps from training, found again whatever has become of them.

    FSDP2 puts its own parameters in the places of a model's, under their names; PEFT gives them
    other names. They are not kept alive, or a model that was sharded would stay on each rank whole.
    """

    def __init__(self, parameters: Mapping[str, Parameter | None]) -> None:
        self._by_name = {
            name: None if parameter is None else weakref.ref(parameter)
            for name, parameter in parameters.items()
        }

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def __reduce__(self) -> tuple[type[Frozen], tuple[dict[str, Parameter | None]]]:
        # Copies and files hold the parameters of the copy.
        return Frozen, (self._alive(),)

    def among(self, named: Mapping[str, Parameter]) -> set[Parameter]:
        """Those of a model's parameters, as they are now, that are the frozen ones."""
        present = set(named.values())
        return {
            found
            for name, parameter in self._alive().items()
            if (found := parameter if parameter in present else named.get(name)) is not None
        }

    def _alive(self) -> dict[str, Parameter | None]:
        return {name: None if ref is None else ref() for name, ref in self._by_name.items()}
