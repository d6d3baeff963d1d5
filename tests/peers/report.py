"""What passes unpatched and patched, in words and in `docs/peers.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from tests.peers.libraries import LIBRARIES, VARIANTS
from tests.peers.running import Outcome

RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "peers.md"
INTRODUCTION = """# The libraries' own tests, on patched models

The tests that transformers, timm and open_clip have of their models run once as they are and once
for each of three patches that must not be noticed, on every model that a test makes:

| variant | patch |
| --- | --- |
| `instrument` | `patch_model(model, "instrument")`: attention goes through this library's core |
| `zero_effect` | `attention_bias`, `kind="kv"`, `init="zero_effect"`: parameters without effect |
| `out_of_reach` | `set_mean` at all layers, with a gate that no value reaches |

What passes unpatched must pass patched. The command that ran them wrote this page; it takes the
tests from the source distribution of the installed version, nothing of them is copied here:

```
python -m tests.peers --write      # or --library timm, --family llama
```

A number counts the tests that pass unpatched, of those in which a model was patched: `107 / 108`
is one difference. Models without weights (meta device) and TorchScript's are not patched.
transformers' distribution has its common tests (`tests/test_modeling_common.py`) and no tester for
any model: testers of our own make tiny models of each family, and a few checks stand in for its
tests of generation. Its utilities import `datasets` where that is installed: transformers 4
needs one that its own huggingface_hub can run (`datasets` 4.4 beside 0.36).
"""


@dataclass(frozen=True)
class Count:
    """One variant: the tests that patched a model and pass unpatched, and those that now do not."""

    of: int
    differences: dict[str, str]


@dataclass(frozen=True)
class Family:
    """One family under each variant."""

    library: str
    version: str
    family: str
    counts: dict[str, Count]

    @property
    def key(self) -> str:
        return f"{self.library} {self.version} {self.family}"

    def name(self, test: str) -> str:
        """The test's own name, with its parameters where they are what makes the difference."""
        name = test.partition("::")[2]
        return name if name in LIBRARIES[self.library].by_design else name.partition("[")[0]

    def reason(self, test: str, variant: str) -> str | None:
        """Why a test does not pass under a variant, if that is by design."""
        reason = LIBRARIES[self.library].by_design.get(self.name(test))
        return reason.why if reason and variant in reason.variants else None

    @property
    def unexplained(self) -> bool:
        return any(
            self.reason(test, variant) is None
            for variant, count in self.counts.items()
            for test in count.differences
        )

    def text(self) -> str:
        lines = []
        for variant, count in self.counts.items():
            lines.append(f"{self.key:32} {variant:13} {_score(count)}")
            for test, why in count.differences.items():
                lines.append(f"    {test}: {self.reason(test, variant) or why[:300]}")
        return "\n".join(lines) + "\n"


def compare(plain: dict[str, Outcome], patched: dict[str, Outcome]) -> Count:
    """The tests that pass unpatched and not patched, with their errors."""
    absent = Outcome("missing", "did not run", True)
    passed = [name for name, found in plain.items() if found.outcome == "passed"]
    now = {name: patched.get(name, absent) for name in passed}
    different = {name: found for name, found in now.items() if found.outcome != "passed"}
    counted = [name for name, found in now.items() if found.patched or name in different]
    return Count(len(counted), {name: one.why or one.outcome for name, one in different.items()})


def write(found: Family) -> None:
    """Into the results, and the document from them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[found.key] = asdict(found)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    DOCUMENT.write_text(document())


def document() -> str:
    """The page, from the results that were written."""
    families = list(read())
    order = list(LIBRARIES)
    families.sort(key=lambda one: (order.index(one.library), one.version, one.family))
    parts = [INTRODUCTION]
    for (library, version), group in groupby(families, key=lambda one: (one.library, one.version)):
        parts.append(f"\n## {library} {version}\n\n{_section(list(group))}")
    return "".join(parts)


def read() -> Iterable[Family]:
    for one in json.loads(RESULTS.read_text()).values():
        counts = {variant: Count(**count) for variant, count in one["counts"].items()}
        yield Family(**(one | {"counts": counts}))


def _section(families: list[Family]) -> str:
    lines = [
        f"| family | {' | '.join(VARIANTS)} |",
        f"| --- |{' --- |' * len(VARIANTS)}",
    ]
    for one in families:
        scores = (_score(one.counts[variant]) for variant in VARIANTS)
        lines.append(f"| {one.family} | {' | '.join(scores)} |")
    if differences := _differences(families):
        lines += ["", "Differences:", "", *differences]
    return "\n".join(lines) + "\n"


def _differences(families: list[Family]) -> list[str]:
    """One line a test: under which variants it differs, and why."""
    variants: dict[tuple[str, str], list[str]] = {}
    for one in families:
        for variant, count in one.counts.items():
            for test, why in count.differences.items():
                reason = one.reason(test, variant) or f"**unexplained**: {why}"
                variants.setdefault((one.name(test), reason), []).append(variant)
    return [
        f"- `{test}` ({', '.join(v for v in VARIANTS if v in found)}): {reason}"
        for (test, reason), found in sorted(variants.items())
    ]


def _score(count: Count) -> str:
    return f"{count.of - len(count.differences)} / {count.of}"
