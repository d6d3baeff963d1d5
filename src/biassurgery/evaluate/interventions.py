"""The intervention table: one evaluation under several patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from biassurgery.adapters.registry import Host, Tower, Towers, find_hosts
from biassurgery.data.start import Start, start_id
from biassurgery.errors import BadOption
from biassurgery.evaluate.handed import Handed
from biassurgery.findings.render import Printable, number, table
from biassurgery.findings.sites import Sites
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.modes import MODES, Layers, Mode, resolve_mode
from biassurgery.patching import GivenSites, patched

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

ORIGINAL = "original"
_SHARES = ("top1", "knn", "linear", "zero_shot")  # numbers from 0 to 1 that are shown in per cent
_VALUE = "value"  # the column of an `evaluate` that returns a plain number


@dataclass(frozen=True)
class Row:
    """One line of the table: a mode (None: the model as it is), its label, what was measured."""

    mode: Mode | None
    label: str
    values: dict[str, float]


@dataclass(frozen=True)
class Comparison(Printable):
    """What `evaluate` said under each mode; `print` it for a table, `to_pandas` for a frame.

    `comparison["set_zero"]`, `comparison[mode_object]` and `comparison[None]` (or `"original"`)
    give what `evaluate` returned.

    Attributes:
        rows: one a mode, in the order in which they were given.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, mode: str | Mode | None) -> Any:
        key = ORIGINAL if mode is None else mode
        rows = [row for row in self.rows if key in (row.label, row.mode)]
        rows = rows or [row for row in self.rows if row.mode is not None and row.mode.name == key]
        if len(rows) != 1:
            raise BadOption(
                f"mode: {mode!r} names {len(rows)} rows; they are"
                f" {', '.join(repr(row.label) for row in self.rows)}."
            )
        values = rows[0].values
        return values[_VALUE] if list(values) == [_VALUE] else dict(values)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a mode, one column a measured number."""
        import pandas

        return pandas.DataFrame(
            [row.values for row in self.rows],
            index=pandas.Index([row.label for row in self.rows], name="mode"),
        )

    def __rich__(self) -> Table:
        """One row a mode, one column a measured number."""
        names = list(self.rows[0].values)
        lines = table("Interventions", "mode", *names, left=("mode",))
        for row in self.rows:
            cells = [
                f"{100 * value:.2f} %" if name in _SHARES else number(value)
                for name, value in row.values.items()
            ]
            lines.add_row(row.label, *cells)
        return lines


def compare(
    model: nn.Module,
    evaluate: Callable[..., float | Mapping[str, float]],
    modes: Sequence[str | Mode | None] = (None, "set_zero", "set_mean"),
    *,
    sites: GivenSites = None,
    layers: Layers = None,
    tower: Towers | None = None,
    start: Start = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    group: Group = None,
    **options: Any,
) -> Comparison:
    """Evaluate a model under each of several patches, as in Sun et al. 2024, table 3.

    The model is as it was afterwards, whatever happens.

    Args:
        model: a model of a supported architecture; patches that it has already stay on throughout.
        evaluate: called with the model; returns a number, or several by name.
        modes: None (the model as it is), names, or mode objects, in the order of the rows.
        sites, layers, tower: as in `patch_model`; sites that are not given are looked up or
            calibrated once.
        start: a constant token in front, see `with_start`: sites that are not given are calibrated
            behind it, and `evaluate(model, start=id)` is called with it, or with None under
            `transplant`, in whose attention it is; `perplexity` scores the same tokens either way.
        tokenizer: the model's, where `start` is a token.
        checkpoint: a name for files, one a mode, which `evaluate(model, checkpoint=file)` is then
            called with: `file.original`, `file.set_zero` and so on. A killed comparison goes on
            where it was, if `evaluate` hands the file on to what it measures.
        group: which ranks of `torch.distributed` do this together, see `calibrate`; this library's
            own evaluations in `evaluate` then add up over the same ranks.
        **options: fields of the modes given by name; each takes those that it has.

    Raises:
        SurgeryError: a mode that cannot be applied, before anything is evaluated.
        BadOption: also if `evaluate` returns other numbers on other ranks, or takes no
            `checkpoint` or `start`.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("compare", model, group) as ranks:
        hosts = find_hosts(model, tower)
        front = start_id(hosts[0], start, tokenizer)
        handed = Handed(evaluate, checkpoint, front)
        chosen = _resolve(modes, options)
        if sites is None and any(mode is not None and mode.needs_sites for mode in chosen.values()):
            sites = _default_sites(model, hosts, front)

        def under(mode: Mode | None, do: Callable[[Any], Any]) -> Any:
            if mode is None:
                return do(model)
            with patched(
                model, mode, sites=sites if mode.needs_sites else None, layers=layers, tower=tower
            ):
                return do(model)

        # On and off again: what cannot be applied is refused before the first long evaluation.
        for mode in chosen.values():
            under(mode, lambda _: None)
        rows = [
            Row(mode, label, _numbers(under(mode, handed.evaluation_of(label, mode))))
            for label, mode in chosen.items()
        ]
        _check_names(rows)
        ranks.check({row.label: row.values for row in rows}, _check_same)
    return Comparison(tuple(rows))


def _default_sites(model: nn.Module, hosts: Sequence[Host], start: int | None) -> GivenSites:
    """The sites of a model, or of each of its towers, that `patch_model` takes by default."""
    from biassurgery.modes.defaults import default_sites

    by_tower: dict[Tower | None, Sites] = {
        host.tower: default_sites(model, host, start) for host in hosts
    }
    if None in by_tower:
        return by_tower[None]
    return {tower: sites for tower, sites in by_tower.items() if tower is not None}


def _check_same(answers: dict[int, dict[str, dict[str, float]]]) -> None:
    """Refuse numbers that are of one rank's data."""
    (first, rows), *others = answers.items()
    for rank, other_rows in others:
        for label in rows.keys() | other_rows.keys():
            mine = rows.get(label, {})
            other = other_rows.get(label, {})
            if mine.keys() != other.keys() or not all(_equal(mine[n], other[n]) for n in mine):
                raise BadOption(
                    f"evaluate: under {label} it returned {mine} on rank {first} and {other} on"
                    f" rank {rank}; let it return what holds for all ranks, as perplexity() and"
                    " the accuracies do, or pass group=False for a table of each rank's own."
                )


def _equal(a: float, b: float) -> bool:
    """Whether two numbers are one up to the rounding of a sum over ranks."""
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def _check_names(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.values.keys() != rows[0].values.keys():
            raise BadOption(
                f"evaluate: it returned {sorted(row.values)} under {row.label} and"
                f" {sorted(rows[0].values)} under {rows[0].label}; return the same names every"
                " time."
            )


def label_of(mode: Mode) -> str:
    """A mode's name, with the fields that are not at their default: `noise(scale=2.0)`."""
    options = [
        f"{field.name}={value!r}"
        for field in fields(mode)
        if (value := getattr(mode, field.name)) != field.default or field.default is MISSING
    ]
    return f"{mode.name}({', '.join(options)})" if options else mode.name


def _resolve(modes: Sequence[str | Mode | None], options: dict[str, Any]) -> dict[str, Mode | None]:
    """Every mode by its label, in order."""
    if isinstance(modes, (str, Mode)) or not modes:
        raise BadOption(
            f"modes: {modes!r}; give a list, for example [None, 'set_zero', 'set_mean']."
        )
    chosen: dict[str, Mode | None] = {}
    used: set[str] = set()
    for item in modes:
        if item is None or item == ORIGINAL:
            label = ORIGINAL
            mode = None
        else:
            own_options = {name: options[name] for name in options if name in _fields(item)}
            mode = resolve_mode(item, own_options)
            label = label_of(mode)
            used |= set(own_options)
        if label in chosen:
            raise BadOption(f"modes: {label!r} is there twice; give each once.")
        chosen[label] = mode
    unused = sorted(set(options) - used)
    if unused:
        raise BadOption(
            f"options: no mode given by name has {', '.join(map(repr, unused))}; set the options of"
            " a mode object on it."
        )
    return chosen


def _fields(mode: str | Mode) -> set[str]:
    """The options that a mode given by name takes."""
    if isinstance(mode, str) and mode in MODES:
        return {field.name for field in fields(MODES[mode])}
    return set()


def _numbers(result: Any) -> dict[str, float]:
    """What `evaluate` returned, as numbers by name."""
    named = result if isinstance(result, Mapping) else {_VALUE: result}
    try:
        values = {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(
            f"evaluate: it returned {result!r}; return a number, or a dict of numbers."
        ) from error
    if not values:
        raise BadOption(
            "evaluate: it returned an empty dict; return a number, or a dict of numbers."
        )
    return values
