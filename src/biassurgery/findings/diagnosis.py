"""`Diagnosis`: what breaks in a model under int8, float16 and eviction, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.diagnosed import (
    Float16,
    LinearRange,
    Measured,
    SinkUse,
    SuperWeight,
    check_ratio,
)
from biassurgery.findings.fields import items, whole, words
from biassurgery.findings.finding import Finding, check_finite
from biassurgery.findings.render import Printable, number, table
from biassurgery.findings.site import Origin, Site
from biassurgery.findings.sites import Sites
from biassurgery.findings.verdict import RATIO, Evidence, advice, verdict

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table

_ROWS = 6  # of linear layers that are printed
_NOTES = 6  # that are printed
_WEIGHTS = 3


@dataclass(frozen=True, repr=False)
class Diagnosis(Printable, Finding):
    """What breaks in a model under int8, float16 and eviction, and what to do.

    `print` it for the verdict and what it rests on, `to_pandas` for all linear layers.

    Attributes:
        linears: the range of every linear layer in the blocks, in the model's order.
        super_weights: single weights that write the massive activations, the largest contribution
            first; the first ones confirmed by what the loss of a short text is without them.
        float16: the head room that the model has in it.
        sinks: how much attention the first token gets, and what its eviction costs; None: the
            attention cannot be read.
        sites: the massive activations themselves, as `calibrate` finds them on these data, for
            `patch_model`; they do not add up.
        carriers: how many tokens of each role carry massive activations.
        sequences, tokens: how many were read.
        modality: `text` or `image`.
        not_told: linear layers that read some tokens only, or other ones than the model's (experts;
            the keys and values of cross-attention), so that ordinary and massive ones cannot be
            told apart, and modules that hold several experts; they have no range here.
        measured: perplexities under fake quantisation, where they were asked for.
        notes: what could not be measured, and why.
    """

    file_key: ClassVar[str] = "biassurgery.diagnosis"
    what: ClassVar[str] = "a diagnosis"
    linears: tuple[LinearRange, ...]
    super_weights: tuple[SuperWeight, ...]
    float16: Float16
    sinks: SinkUse | None
    sites: Sites
    carriers: Mapping[str, int]
    sequences: int
    tokens: int
    modality: str = "text"
    not_told: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        numbers: dict[str, float | None] = {
            f"{linear.name}: {name}": getattr(linear, name)
            for linear in self.linears
            for name in ("largest", "ordinary", "returned")
        }
        numbers |= {f"layer {layer}": value for layer, value in self.float16.layers.items()}
        for weight in self.super_weights:
            for name in ("value", "contribution", "share", "loss"):
                numbers[f"{weight.place}: {name}"] = getattr(weight, name)
        check_finite("diagnosis", numbers, "diagnose(model, batches) again")

    @property
    def verdict(self) -> tuple[str, str, str, str]:
        """Four lines: massive activations, int8, float16, the first token."""
        return verdict(self._evidence)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, each sentence with the call to make; empty where there is nothing to do."""
        return advice(self._evidence)

    def ignore(self, ratio: float = RATIO) -> list[str]:
        """Names of the linear layers to leave in floating point, or to scale per token.

        As `ignore=` of llm-compressor, `nodes_to_exclude` of ONNX Runtime and filters of torchao
        take them.

        Args:
            ratio: of what a layer reads, the largest magnitude over that of ordinary tokens, from
                which on it is among them.

        Raises:
            BadOption: no number of at least 1.
        """
        least = check_ratio(ratio)
        return [linear.name for linear in self.linears if linear.ratio >= least]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a linear layer.

        The columns are layer, largest, ordinary, ratio, token and returned.
        """
        import pandas

        rows = [
            {
                "name": linear.name,
                "layer": linear.layer,
                "largest": linear.largest,
                "ordinary": linear.ordinary,
                "ratio": linear.ratio,
                "token": str(linear.token),
                "returned": linear.returned,
            }
            for linear in self.linears
        ]
        columns = ["name", "layer", "largest", "ordinary", "ratio", "token", "returned"]
        return pandas.DataFrame(rows, columns=columns).set_index("name")

    @property
    def measured_on(self) -> dict[str, Any]:
        """Facts of the model that it was measured on, for `check_fits`."""
        return self.sites.measured_on

    @property
    def _evidence(self) -> Evidence:
        return Evidence(
            self.sites,
            self.carriers,
            self.tokens,
            self.linears,
            self.super_weights,
            self.float16,
            self.sinks,
            self.measured,
            self.modality,
            self.not_told,
        )

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> Group:
        """The verdict, what it rests on, and the advice: about one screen."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text("\n".join(self.verdict)), self._linears_table()]
        if self.super_weights:
            parts.append(self._weights_table())
        if self.measured:
            parts.append(self._measured_table())
        lines = [f"- {sentence}" for sentence in self.advice]
        lines += [f"({note})" for note in self.notes[:_NOTES]]
        if len(self.notes) > _NOTES:
            lines.append(f"(and {len(self.notes) - _NOTES} more notes)")
        if self.not_told:
            lines.append(
                f"({len(self.not_told)} linear layers or stacks of experts read some tokens only,"
                f" or other ones: left out, as {self.not_told[0]})"
            )
        return Group(*parts, Text("\n".join(lines)))

    def _linears_table(self) -> Table:
        """The linear layers with the highest ratios."""
        title = f"Largest magnitude that linear layers read (the {_ROWS} highest ratios)"
        columns = ("name", "largest", "ordinary", "ratio", "largest at")
        rows = table(title, *columns, left=("name", "largest at"))
        rows.columns[0].no_wrap = True  # names are for copying
        for linear in sorted(self.linears, key=lambda linear: -linear.ratio)[:_ROWS]:
            numbers = (linear.largest, linear.ordinary, linear.ratio)
            rows.add_row(linear.name, *map(number, numbers), str(linear.token))
        return rows

    def _weights_table(self) -> Table:
        columns = ("weight", "value", "writes", "of its matrix", "loss without it")
        rows = table("Weights that write massive activations", *columns, left=("weight",))
        rows.columns[0].no_wrap = True
        for weight in self.super_weights[:_WEIGHTS]:
            loss = "" if weight.loss is None else f"{weight.loss:+.2f} nats"
            numbers = (number(weight.value), number(weight.contribution))
            rows.add_row(weight.place, *numbers, f"{100 * weight.share:.0f} %", loss)
        return rows

    def _measured_table(self) -> Table:
        """One row a quantisation, one column a remedy."""
        remedies = list(dict.fromkeys(row.remedy for row in self.measured))
        rows = table(
            "Perplexity under fake int8", "quantisation", *remedies, left=("quantisation",)
        )
        cells = {(row.quantisation, row.remedy): row.perplexity for row in self.measured}
        for quantisation in dict.fromkeys(row.quantisation for row in self.measured):
            values = [cells.get((quantisation, remedy)) for remedy in remedies]
            rows.add_row(quantisation, *("" if v is None else number(v) for v in values))
        return rows

    def header(self) -> dict[str, Any]:
        return {
            "linears": [asdict(linear) for linear in self.linears],
            "super_weights": [asdict(weight) for weight in self.super_weights],
            "float16": self.float16.to_json(),
            "sinks": None if self.sinks is None else self.sinks.to_json(),
            "origin": asdict(self.sites.origin),
            "sites": [asdict(site) for site in self.sites],
            "carriers": dict(self.carriers),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "modality": self.modality,
            "not_told": list(self.not_told),
            "measured": [asdict(row) for row in self.measured],
            "notes": list(self.notes),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Diagnosis:
        if header["modality"] not in ("text", "image"):
            raise BadOption(f"modality: {header['modality']!r}; give 'text' or 'image'.")
        sites = Sites(
            [Site.from_json(site) for site in items("sites", header["sites"])],
            origin=Origin.from_json(header["origin"]),
        )
        carriers = {words("role", r): whole("count", n) for r, n in header["carriers"].items()}
        return cls(
            tuple(LinearRange.from_json(row) for row in items("linears", header["linears"])),
            tuple(SuperWeight.from_json(row) for row in items("weights", header["super_weights"])),
            Float16.from_json(header["float16"]),
            None if header["sinks"] is None else SinkUse.from_json(header["sinks"]),
            sites,
            carriers,
            whole("sequences", header["sequences"]),
            whole("tokens", header["tokens"]),
            header["modality"],
            tuple(words("name", name) for name in items("not_told", header["not_told"])),
            tuple(Measured.from_json(row) for row in items("measured", header["measured"])),
            tuple(words("note", note) for note in items("notes", header["notes"])),
        )
