"""What the site has beside its pages: `llms.txt`, a line a page, for language models.

Made of the navigation, so that no page is forgotten (https://llmstxt.org).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ABOUT = """# {name}

> {description}

A PyTorch library, `import biassurgery as bs`. The everyday names are `diagnose`, `detect`,
`calibrate`, `patch_model`, `unpatch_model`, `patched`, `record` and `compare`. Every refusal is a
`SurgeryError` that says what to do next. Unpatching is bitwise.
"""
_sentences: dict[str, str] = {}
_END = re.compile(r"(?<!\bal)(?<=[.:?])\s")
_SHORT = 24  # characters; less is a number or a heading


def sentence(markdown: str) -> str:
    """The first sentence of a page, without its markup; empty: the page has none."""
    for paragraph in re.split(r"\n\s*\n", markdown):
        text = " ".join(paragraph.split())
        if not text or text.startswith(("#", "|", "!", "```", "<", "- ", ":::", "--8<--")):
            continue
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", lambda match: match[1] or "", text)
        plain = plain.removeprefix("Symptom. ")
        ends = [end.start() for end in _END.finditer(plain) if end.start() >= _SHORT]
        return plain[: ends[0]] if ends else plain
    return ""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Remember the page's first sentence."""
    _sentences[page.file.src_uri] = sentence(markdown)


def on_nav(nav: Any, **_: Any) -> None:
    """Remember the pages in their order."""
    on_nav.pages = nav.pages  # type: ignore[attr-defined]


def on_post_build(config: Any, **_: Any) -> None:
    """Write `llms.txt` into the root of the site."""
    about = _ABOUT.format(name=config["site_name"], description=config["site_description"])
    lines = [
        f"- [{page.title}]({config['site_url']}{page.url}): {_sentences[page.file.src_uri]}".rstrip(
            ": "
        )
        for page in on_nav.pages  # type: ignore[attr-defined]
    ]
    text = "\n".join([about, "## Pages", "", *lines, ""])
    (Path(config["site_dir"]) / "llms.txt").write_text(text)
