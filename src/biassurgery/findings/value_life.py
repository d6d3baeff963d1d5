"""The life of a massive activation: what writes it, how large it is, what attention it draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from biassurgery.findings.diagnosed import SuperWeight
from biassurgery.findings.render import Printable, noted, number, table
from biassurgery.findings.site import Site

if TYPE_CHECKING:
    import pandas
    from rich.console import Group


@dataclass(frozen=True)
class LifeInBlock:
    """One block of a value's life; numbers are means over the tokens that carry it.

    Attributes:
        layer: 0-based index of the block.
        value, std: of the channel behind the block, at the tokens that carry it.
        ordinary: its mean magnitude at the tokens whose value is not massive where it is born.
        attention: the share of the attention of later tokens of the sequence (in images of all
            others) on the token that carries it, mean over heads; None: the block does not attend,
            or its attention cannot be read.
        strongest: the same in the head that has most.
    """

    layer: int
    value: float
    std: float
    ordinary: float
    attention: float | None
    strongest: float | None


@dataclass(frozen=True, repr=False)
class ValueLife(Printable):
    """A massive activation from the weights that write it to the attention that it draws.

    Attributes:
        site: where it is born.
        weights: the single weights that write most of it, as `diagnose` finds them; empty: none
            stands out, or they cannot be read.
        blocks: in order.
        carriers: how many tokens carry it, one a sequence.
        sequences: how many were read.
    """

    site: Site
    weights: tuple[SuperWeight, ...]
    blocks: tuple[LifeInBlock, ...]
    carriers: int
    sequences: int

    def to_pandas(self) -> pandas.DataFrame:
        """One row a block."""
        import pandas

        return pandas.DataFrame([asdict(one) for one in self.blocks]).set_index("layer")

    def __repr__(self) -> str:
        return (
            f"ValueLife(channel {self.site.channel}, {self.site.role}, born at block"
            f" {self.site.layer}, {len(self.weights)} weights)"
        )

    def __rich__(self) -> Group:
        columns = ("block", "value", "std", "elsewhere", "attention", "strongest head")
        title = f"Life of the value in channel {self.site.channel} ({self.site.role})"
        lines = table(title, *columns)
        for one in self.blocks:
            shares = (
                "" if x is None else f"{100 * x:.1f} %" for x in (one.attention, one.strongest)
            )
            lines.add_row(str(one.layer), *map(number, (one.value, one.std, one.ordinary)), *shares)
        written = "; ".join(
            f"{weight.place} = {weight.value:.4g} writes {weight.contribution:,.0f}"
            for weight in self.weights
        )
        note = f"written by {written}" if written else "no single weight stands out as its writer"
        return noted(lines, f"{note}; {self.carriers:,} tokens carry it")
