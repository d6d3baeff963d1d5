"""The pages on tasks and on numbers: their code runs, and prints what they say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import biassurgery as bs
from biassurgery.adapters import registry
from tests.packaging.pages import DOCS, ran, same

ROOT = DOCS.parent
# Other libraries, processes or files: seconds each, for what tests of their own show.
LONG = {"lm-eval", "peft-trainer", "several-processes", "gguf", "quantise"}
TASKS = sorted(file.stem for file in (DOCS / "tasks").glob("*.md"))
PAGES = [
    *(
        pytest.param(f"tasks/{name}.md", marks=[pytest.mark.long] if name in LONG else [])
        for name in TASKS
    ),
    "numbers-differ.md",
]
SCREEN = 110  # lines of Markdown, code included


@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ADAPTERS", list(registry._ADAPTERS))
    told = 0
    for block in ran(page):
        assert same(block.printed, block.shown or ""), f"{block.code}\nprints\n{block.printed}"
        told += bool(block.shown)
    assert told >= 1


@pytest.mark.parametrize("name", sorted({*TASKS} - {"index"}))
def test_a_page_on_a_task_is_whole_and_short(name: str) -> None:
    text = (DOCS / "tasks" / f"{name}.md").read_text()
    for part in ("**Symptom.**", "**Cause.**", 'title="wrong"', 'title="right"'):
        assert part in text, part
    assert len(text.splitlines()) <= SCREEN
    assert f"({name}.md)" in (DOCS / "tasks" / "index.md").read_text()


def test_numbers_are_compared() -> None:
    assert same("off by 4.32", "off by  4.30")
    assert not same("off by 4.32", "off by 4.02")
    assert not same("off by 4.32", "off 4.32")
    assert same("Error: this, that", "Error: ... that")
    assert not same("set: 5", "set: 6")
    assert not same("-4.32", "4.32")


def test_llms_txt_names_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mkdocs calls the hooks: the navigation, then each page, then the site is there."""
    monkeypatch.syspath_prepend(ROOT)
    hooks = importlib.import_module("mkdocs_hooks")
    uris = ["index.md", "questions.md", "tasks/no-bos.md", "reference.md"]
    pages = [
        SimpleNamespace(title=uri, url=uri[:-3] + "/", file=SimpleNamespace(src_uri=uri))
        for uri in uris
    ]
    hooks.on_nav(SimpleNamespace(pages=pages))
    for page in pages:
        hooks.on_page_markdown((DOCS / page.file.src_uri).read_text(), page)
    site = {"site_name": "n", "site_description": "d", "site_url": "u/", "site_dir": tmp_path}
    hooks.on_post_build(site)
    text = (tmp_path / "llms.txt").read_text()
    assert text.startswith("# n\n\n> d\n")
    assert re.findall(r"^- \[(.*?)\]\(u/\S+/\): \S", text, re.M) == uris
    assert "no-bos/): Perplexity is absurd, a chat model rambles" in text


def test_the_ten_questions_are_answered_where_they_link() -> None:
    text = (DOCS / "questions.md").read_text()
    assert re.findall(r"^\*\*(\d+)\. .*?\?\*\*", text, re.M) == [str(n) for n in range(1, 11)]
    for question in re.split(r"^\*\*\d+\. ", text, flags=re.M)[1:]:
        targets = re.findall(r"\]\((?!https)([^)#]+)", question)
        assert targets, question
        assert all((DOCS / target).is_file() for target in targets)
    called = set(re.findall(r"\bbs\.(\w+)", text))
    assert called
    assert all(hasattr(bs, name) for name in called)


def test_the_changelog_is_not_a_copy() -> None:
    assert (DOCS / "changelog.md").read_text().strip() == '--8<-- "CHANGELOG.md"'
