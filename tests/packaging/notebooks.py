"""The notebooks of `examples/`: their cells run in this process, one namespace a notebook.

`python -m tests.packaging.notebooks NAME ...` runs notebooks and writes what comes out into them:
what a cell prints, and the figure that it ends with. There are no widgets, so no kernel is needed.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

EXAMPLES = Path(__file__).parents[2] / "examples"
_DPI = 80


class Ran(NamedTuple):
    """A code cell of a notebook, what it printed, and the figure that it ended with."""

    cell: dict[str, Any]
    printed: str
    figure: Figure | None

    @property
    def shown(self) -> str:
        """What the notebook says that the cell prints."""
        return "".join(
            "".join(output["text"])
            for output in self.cell["outputs"]
            if output["output_type"] == "stream"
        )


def read(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text())


def ran(notebook: dict[str, Any]) -> Iterator[Ran]:
    """Run the code cells, in their order."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = _run("".join(cell["source"]), f"cell {number}", names)
        printed = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
        yield Ran(cell, printed, value if isinstance(value, Figure) else None)


def _run(code: str, where: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: its value is that of the expression at its end, if any."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), where, "eval"), names)


def _outputs(each: Ran) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = []
    if each.printed:
        lines = (each.printed + "\n").splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if each.figure is not None:
        png = io.BytesIO()
        each.figure.savefig(png, format="png", dpi=_DPI)
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def write(name: str) -> None:
    """Run a notebook and put what comes out into it."""
    notebook = read(name)
    for each in ran(notebook):
        each.cell["outputs"] = _outputs(each)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    (EXAMPLES / f"{name}.ipynb").write_text(text + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
