"""torch.fx runs a forward on stand-ins for tensors, which no edit can look at."""

from __future__ import annotations

from typing import Any

from torch.fx import Proxy

from biassurgery.errors import UnsupportedModel


def check_not_traced(x: Any) -> None:
    """Raise `UnsupportedModel` if torch.fx is tracing the model."""
    if isinstance(x, Proxy):
        raise UnsupportedModel(
            "model: torch.fx traces it with stand-ins for tensors, whose numbers and shapes a patch"
            " or an observer cannot see; unpatch it before it is traced, or use torch.compile or"
            " torch.export, which trace patched models."
        )
