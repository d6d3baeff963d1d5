"""A mode on activations; found by the entry point in pyproject.toml."""

from dataclasses import dataclass

from biassurgery.extend import WriteMode


@dataclass(frozen=True)
class Shrink(WriteMode):
    """Massive activations become a part of their means."""

    name = "shrink"
    by: float = 0.5

    def write(self, site):
        return site.mean * self.by
