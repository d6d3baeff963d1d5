"""The house is kept: short files, short functions, short lines, few entries at the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "biassurgery"
FILES = sorted(SOURCE.rglob("*.py"))
FILE_LINES = 300
FUNCTION_LINES = 40
COLUMNS = 100
PRAGMA = re.compile(r"\s+# (type: ignore|pyright: ignore|noqa)\b.*")  # for tools, not for readers
ENTRIES = 25

# What is still longer, and must not stay so. A name leaves its list as soon as it is shorter.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every function with its qualified name, those inside of classes and functions included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(node, f"{prefix}{node.name}." if named else prefix)


def length(function: ast.AST) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1  # type: ignore[operator]
    return lines


def test_the_source_was_found() -> None:
    assert {"__init__.py", "ops/attend.py"} <= {name_of(file) for file in FILES}


def test_a_function_is_measured_without_its_docstring() -> None:
    code = """
class A:
    def f(self):
        '''Two
        lines.'''
        def g(): pass
        return g
"""
    assert [(name, length(node)) for name, node in functions(ast.parse(code))] == [
        ("A.f", 3),
        ("A.f.g", 1),
    ]


def test_no_file_is_long() -> None:
    long = {name_of(file) for file in FILES if len(file.read_text().splitlines()) > FILE_LINES}
    assert long == LONG_FILES


def test_no_function_is_long() -> None:
    long = {
        f"{name_of(file)}: {name}"
        for file in FILES
        for name, node in functions(ast.parse(file.read_text()))
        if length(node) > FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_line_is_long(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert [
        number for number, line in enumerate(lines, 1) if len(PRAGMA.sub("", line)) > COLUMNS
    ] == []


def test_few_entries_at_the_top() -> None:
    entries = {path.name for path in SOURCE.iterdir()} - {"__pycache__"}
    assert len(entries) <= ENTRIES, sorted(entries)


def test_every_folder_of_modules_is_a_package() -> None:
    """One without `__init__.py` can be imported, but no tool that reads imports sees it."""
    folders = {file.parent for file in FILES}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_readme_has_no_relative_links() -> None:
    """They are dead on a package index."""
    text = (SOURCE.parents[1] / "README.md").read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    here = "https://github.com/biassurgery/biassurgery/blob/main/"
    pages = [target.removeprefix(here).split("#")[0] for target in targets if here in target]
    assert pages
    assert [page for page in pages if not (SOURCE.parents[1] / page).is_file()] == []
