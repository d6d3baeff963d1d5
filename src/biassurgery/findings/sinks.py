"""Attention sinks of a model, as `detect` measures them. docs/sinks.md has all formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biassurgery.findings.render import Printable, noted, table

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True, repr=False)
class LayerSinks:
    """One layer; tuples have an entry for each head.

    Massive activations are those at the layer's input.

    Attributes:
        attention: mean attention that other tokens of a sequence pay to its start token ([CLS], or
            the first token, in images).
        sink: share of the sequences whose start token is a sink.
        on_massive: mean attention that the same queries pay to all tokens with massive activations.
        massive_tokens: how many tokens hold massive activations; none are looked for at the input
            of layer 0, the embeddings.
        massive_sinks: share of all pairs (such a token, head) in which the token is a sink; NaN
            where there is no such token.
        start_massive: share of the attention on start tokens that goes to ones with massive
            activations.
        roles: in images, mean attention that a token pays to all tokens of a role.
    """

    layer: int
    attention: tuple[float, ...]
    sink: tuple[float, ...]
    on_massive: tuple[float, ...]
    massive_tokens: int
    massive_sinks: float
    start_massive: float
    roles: Mapping[str, tuple[float, ...]]

    def __repr__(self) -> str:
        shares = f"attention {_percent(_mean(self.attention))}, sinks {_percent(_mean(self.sink))}"
        return f"LayerSinks(layer {self.layer}, {len(self.attention)} heads, {shares})"


@dataclass(frozen=True, repr=False)
class Sinks(Printable):
    """Attention sinks of a model.

    Attributes:
        layers: one entry a layer that attends.
        epsilon: mean attention above which a token is a sink.
        sequences, queries: how many start tokens, and how many other tokens of their sequences,
            were read.
        without_attention: the layers that do not attend (hybrid models keep a recurrent state in
            them), which are left out.
    """

    layers: tuple[LayerSinks, ...]
    epsilon: float
    sequences: int
    queries: int
    without_attention: tuple[int, ...] = ()

    @property
    def metric(self) -> float:
        """Share of (sequence, layer, head) whose start token is a sink: Gu et al. 2025's metric."""
        return _mean([share for layer in self.layers for share in layer.sink])

    def __repr__(self) -> str:
        return (
            f"Sinks({len(self.layers)} layers, metric {_percent(self.metric)},"
            f" {self.sequences:,} sequences)"
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer.

        The columns are attention (mean over heads), attention_max, sink, on_massive,
        massive_tokens, massive_sinks, start_massive.
        """
        import pandas

        return pandas.DataFrame([self._row(layer) for layer in self.layers]).set_index("layer")

    def __rich__(self) -> Group:
        from rich.console import Group

        rows = table(
            "Attention on the start token, and on tokens with massive activations",
            "layer",
            "mean",
            "highest head",
            "sinks",
            "massive tokens",
            "on massive",
            "start on massive",
            "massive sinks",
        )
        for layer in self.layers:
            row = self._row(layer)
            shares = [row["attention"], row["attention_max"], row["sink"]]
            overlap = [row["on_massive"], row["start_massive"], row["massive_sinks"]]
            rows.add_row(
                str(layer.layer),
                *map(_percent, shares),
                f"{layer.massive_tokens:,}" if layer.massive_tokens else "",
                *map(_percent, overlap if layer.massive_tokens else []),
            )
        metric = noted(rows, self._note())
        return Group(metric, self._roles_table()) if self.layers[0].roles else metric

    def _note(self) -> str:
        note = (
            f"sink metric {_percent(self.metric)}: share of (sequence, layer, head) in which the"
            f" start token\n  gets more than {self.epsilon:g} of the attention (Gu et al. 2025);"
            " massive activations are\n  those at a layer's input\n"
        )
        if self.without_attention:
            layers = ", ".join(map(str, self.without_attention))
            note += f"  layers without attention: {layers}\n"
        return note

    def _roles_table(self) -> Table:
        """One row a layer: attention on the tokens of each role, mean over heads."""
        rows = table("Attention by role", "layer", *self.layers[0].roles)
        for layer in self.layers:
            rows.add_row(
                str(layer.layer), *(_percent(_mean(values)) for values in layer.roles.values())
            )
        return rows

    @staticmethod
    def _row(layer: LayerSinks) -> dict[str, Any]:
        return {
            "layer": layer.layer,
            "attention": _mean(layer.attention),
            "attention_max": max(layer.attention),
            "sink": _mean(layer.sink),
            "on_massive": _mean(layer.on_massive),
            "massive_tokens": layer.massive_tokens,
            "massive_sinks": layer.massive_sinks,
            "start_massive": layer.start_massive,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
