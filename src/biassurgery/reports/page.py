"""Sections as one HTML page that needs nothing else: no network, no server."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from biassurgery.errors import MissingPackage
from biassurgery.reports.section import Section


def page(
    title: str,
    verdict: Sequence[str],
    advice: Sequence[str],
    sections: Sequence[Section],
    made: Mapping[str, str],
) -> str:
    """The page.

    Args:
        title: what the report is about, a model for example.
        verdict: sentences that stand first.
        advice: what to do, a sentence each.
        sections: in their order; the first stands on the first screen, too.
        made: how the report was made, by name.

    Raises:
        MissingPackage: jinja2 or vl-convert-python is not installed.
    """
    jinja2, vl_convert = load_packages()
    folder = files("biassurgery") / "assets" / "report"
    text = {
        name: (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        text["page.html"]
    )
    return template.render(
        title=title,
        verdict=verdict,
        advice=advice,
        sections=sections,
        made=made,
        css=text["page.css"],
        js=text["page.js"],
        vega=vl_convert.javascript_bundle(),
        data=[_data(section) for section in sections],
        picture=_picture,
        script=_script,
    )


def load_packages() -> tuple[Any, Any]:
    """jinja2 and vl-convert-python.

    Raises:
        MissingPackage: one of them is not installed.
    """
    try:
        import jinja2
        import vl_convert
    except ImportError as error:
        raise MissingPackage(
            f"report: {error.name} is not installed; pip install 'biassurgery[report]'."
        ) from error
    return jinja2, vl_convert


def _data(section: Section) -> dict[str, Any]:
    """What the page's script needs of a section."""
    columns = {name: [_cell(cell) for cell in cells] for name, cells in section.columns.items()}
    return {"name": section.name, "columns": columns, "chart": section.chart}


def _cell(value: Any) -> Any:
    """A number in six digits, as JSON has it: what is not finite becomes a word."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _script(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _picture(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
