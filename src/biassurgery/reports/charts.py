"""The charts of a report, in Vega-Lite's words; their data are the columns of a section.

The page gives them their width, their colours of text and lines, and the data, as `rows`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from biassurgery.plots.figures import BLUE, GREEN, RED

_KINDS = [RED, BLUE, "#8a8a8a", GREEN]
_SHAPES = ["triangle-up", "square", "circle", "diamond"]
Chart = dict[str, Any]

_HEIGHT = 260  # pixels
_LINE = 22
_LONG = {"labelLimit": 260, "grid": True}
_ROW = 10  # pixels of a row of cells, where there are not too many
_TALLEST = 620
_COLOURS = [BLUE, RED, GREEN, "#8a8a8a", "#cc79a7", "#e69f00"]


def lines(x: str, y: str, by: str, hover: Sequence[str], *, log: bool = True) -> Chart:
    """A line for each value of `by` over `x`, whose points tell of themselves."""
    kind = {"field": by, "type": "nominal", "sort": None, "title": None}
    return {
        "height": _HEIGHT,
        "data": {"name": "rows"},
        "mark": {"type": "line", "point": {"size": 40}, "clip": True},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "axis": {"tickMinStep": 1, "grid": False}},
            "y": {
                "field": y,
                "type": "quantitative",
                "scale": {"type": "log" if log else "linear"},
            },
            "color": {**kind, "scale": {"range": _COLOURS}},
            "tooltip": _hover(hover),
        },
    }


def dots(x: str, y: str, hover: Sequence[str], *, rows: int, log: bool = True) -> Chart:
    """A dot for each `y`, in the order of the table."""
    return {
        "height": _LINE * rows,
        "data": {"name": "rows"},
        "mark": {"type": "circle", "size": 90, "opacity": 1, "color": _COLOURS[0]},
        "encoding": {
            "y": {"field": y, "type": "nominal", "sort": None, "title": None, "axis": _LONG},
            "x": {"field": x, "type": "quantitative", "scale": _scale(log)},
            "tooltip": _hover(hover),
        },
    }


def points(
    x: str, y: str, by: str, hover: Sequence[str], kinds: Sequence[str], *, log: bool = True
) -> Chart:
    """A point for each row, in the colour and shape of its kind; what is 0 has no place on logs."""
    order = list(kinds)
    kind = {"field": by, "type": "nominal", "title": None}
    axes = {
        name: {"field": field, "type": "quantitative", "scale": {"type": "log"} if log else {}}
        for name, field in (("x", x), ("y", y))
    }
    chart: Chart = {
        "height": 1.4 * _HEIGHT,
        "data": {"name": "rows"},
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.75},
        "encoding": {
            **axes,
            "color": {**kind, "scale": {"domain": order, "range": _KINDS[: len(order)]}},
            "shape": {**kind, "scale": {"domain": order, "range": _SHAPES[: len(order)]}},
            "tooltip": _hover(hover),
        },
    }
    if log:
        chart["transform"] = [{"filter": f"datum['{x}'] > 0 && datum['{y}'] > 0"}]
    return chart


def cells(
    x: str,
    y: str,
    colour: str,
    hover: Sequence[str],
    *,
    rows: int,
    log: bool = False,
    labels: Sequence[str] = (),
) -> Chart:
    """A cell for each whole (x, y); labels stand for x where they are given."""
    axis: dict[str, Any] = {"labelOverlap": True}
    if labels:
        axis |= {"labelAngle": -60, "labelExpr": f"{json.dumps(list(labels))}[datum.value]"}
    scale = _scale(log) | {"scheme": "viridis"}
    return {
        "height": min(_TALLEST, max(140, _ROW * rows)),
        "data": {"name": "rows"},
        "mark": "rect",
        "encoding": {
            "x": {"field": x, "type": "ordinal", "axis": axis},
            "y": {"field": y, "type": "ordinal", "axis": {"labelOverlap": True}},
            "color": {"field": colour, "type": "quantitative", "scale": scale},
            "tooltip": _hover(hover),
        },
    }


def around_zero(chart: Chart) -> Chart:
    """Cells whose colours differ on the two sides of 0."""
    chart["encoding"]["color"]["scale"] = {"scheme": "blueorange", "domainMid": 0}
    return chart


def with_slider(chart: Chart, column: str, values: Sequence[int], first: int) -> Chart:
    """One value of a column at a time, which a slider chooses."""
    slider = {"input": "range", "min": min(values), "max": max(values), "step": 1}
    chart["params"] = [{"name": column, "value": first, "bind": {**slider, "name": f"{column} "}}]
    chart["transform"] = [{"filter": f"datum.{column} == {column}"}]
    return chart


def _scale(log: bool) -> dict[str, Any]:
    return {"type": "log"} if log else {"type": "linear", "zero": False}


def _hover(names: Sequence[str]) -> list[dict[str, str]]:
    return [{"field": name, "type": "nominal"} for name in names]
