"""What the sinks of each attention head do: nothing, or the same for all.

Source: Fesser et al. 2026 (arXiv 2606.08105), "A Unifying View of Attention Sinks".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from biassurgery.findings.render import Printable, noted, number, table

if TYPE_CHECKING:
    import pandas
    from rich.console import Group

KINDS = ("no sink", "nop", "broadcast", "mixed")
_MOST = 20  # heads that are printed


@dataclass(frozen=True)
class HeadSinks:
    """What the sinks send to the other tokens of their sequences, in one head.

    Attributes:
        layer, head: 0-based.
        share: of the attention of other tokens that goes to the sinks, mean.
        value: the norm of the sinks' values over that of other tokens' values.
        update: the norm of what a query gets from the sinks over that of what it gets from all
            others, means over queries.
        rank: the effective rank of what the sinks send to the queries of one sequence, mean over
            sequences; 1 where all get the same direction, as they do from a single sink.
        output_rank: the same of all that the head returns.
        alike: the mean cosine between what two sequences get from the sinks: near 1 it is a
            constant, else it tells of the sequence; None: there was one sequence.
        kind: one of `no sink`, `nop`, `broadcast`, `mixed`.
    """

    layer: int
    head: int
    share: float
    value: float
    update: float
    rank: float
    output_rank: float
    alike: float | None
    kind: str


@dataclass(frozen=True, repr=False)
class SinkKinds(Printable):
    """Attention sinks by what they do (Fesser et al. 2026).

    Attributes:
        heads: one entry a layer and head.
        min_share: of the attention, from which on a head has a sink.
        max_value: of `HeadSinks.value`, up to which a sink sends nothing: `nop`.
        max_rank: of `HeadSinks.rank`, up to which it sends one thing: `broadcast`.
        sequences, queries: how many were read.
    """

    heads: tuple[HeadSinks, ...]
    min_share: float
    max_value: float
    max_rank: float
    sequences: int
    queries: int

    @property
    def counts(self) -> dict[str, int]:
        """How many heads there are of each kind."""
        found = Counter(head.kind for head in self.heads)
        return {kind: found[kind] for kind in KINDS}

    def by_layer(self) -> dict[int, dict[str, int]]:
        """The same for each layer."""
        layers: dict[int, Counter[str]] = {}
        for head in self.heads:
            layers.setdefault(head.layer, Counter())[head.kind] += 1
        return {layer: {kind: found[kind] for kind in KINDS} for layer, found in layers.items()}

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer and head, one column a number."""
        import pandas

        rows = [asdict(head) for head in self.heads]
        return pandas.DataFrame(rows).set_index(["layer", "head"])

    def __repr__(self) -> str:
        return f"SinkKinds({_listed(self.counts.items())})"

    def __rich__(self) -> Group:
        columns = ("layer", "head", "kind", "share", "value", "update", "rank", "output rank")
        lines = table("What attention sinks send", *columns, "alike", left=("kind",))
        sinks = sorted((one for one in self.heads if one.kind != KINDS[0]), key=lambda h: -h.share)
        for one in sinks[:_MOST]:
            lines.add_row(
                str(one.layer),
                str(one.head),
                one.kind,
                f"{100 * one.share:.0f} %",
                *map(number, (one.value, one.update, one.rank, one.output_rank)),
                "" if one.alike is None else f"{one.alike:.2f}",
            )
        more = len(sinks) - _MOST
        note = f"of {len(self.heads):,} heads: {_listed(self.counts.items())}"
        return noted(lines, (f"and {more:,} more; " if more > 0 else "") + note)


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)


def kind_of(share: float, value: float, rank: float, limits: tuple[float, float, float]) -> str:
    """What a head's sinks do.

    Args:
        share, value, rank: of the head, as in `HeadSinks`.
        limits: `min_share`, `max_value` and `max_rank`, as in `SinkKinds`.
    """
    min_share, max_value, max_rank = limits
    if share < min_share:
        return "no sink"
    if value <= max_value:
        return "nop"
    return "broadcast" if rank <= max_rank else "mixed"
