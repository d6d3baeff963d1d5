"""The support matrix says what the battery does, no more and no less."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biassurgery.modes import MODES
from biassurgery.support import Run, Support, SupportMatrix, matrix, read_rows, supported
from tests.contract import cases, conftest, record
from tests.contract.cases import CASES, NOT_OFFLOADABLE, TYPICAL, VARIANTS, Case
from tests.contract.record import row_of

REWRITE = "run `pytest tests/contract --write-support`; one environment is enough"


def test_the_battery_takes_every_mode() -> None:
    ours = {name for name, mode in MODES.items() if mode.__module__.startswith("biassurgery.")}
    assert {mode for mode, _ in VARIANTS.values()} == ours


def test_the_file_lists_nothing_that_the_battery_does_not_run() -> None:
    assert record.listed(read_rows()) - record.battery() == set(), REWRITE


@pytest.mark.long
def test_what_is_recorded_of_the_installed_versions_is_the_whole_battery() -> None:
    """Of the families that are recorded: others, and other versions, may not have been run."""
    rows = [row_of(library, read_rows()) for library in set(record.LIBRARIES.values())]
    recorded = record.listed([row for row in rows if row is not None])
    families = {family for family, _, _ in recorded}
    wanted = {check for check in record.battery() if check[0] in families}
    assert wanted - recorded == set(), REWRITE


def test_every_case_passed_what_it_needs_under_every_version_that_ran_it() -> None:
    for entry in supported():
        for run in entry.runs:
            if run.checks is not None:
                assert needed_by(Case(entry.family, entry.mode)) <= set(run.checks), (entry, run)


def needed_by(case: Case) -> set[str]:
    """The least that a case must have passed."""
    if case.on_tokens:  # numbers: tests/edits/test_added_token.py
        return {"unpatch", "state dict", "pickle", "save patch", "failure half way"}
    if case.on_weights:
        return {"same function", "unpatch", "save patch", "copies", "config"}
    needed = {"identity", "effect", "unpatch", "autocast", "offload patched"}
    if case.on_roles:
        needed = (needed | {"dtypes"}) - {"autocast"}
    if case.on_attention:  # see `TYPICAL`
        needed |= {"state dict", "dtype"}
        needed -= {"offload patched"} if case.variant not in TYPICAL else set()
        # it cannot be without effect
        needed -= {"identity"} if case.variant == "attention_bias off_by_one" else set()
    if case.family in NOT_OFFLOADABLE:
        needed -= {"offload patched"}
    if case.on_registers:
        # means that are exactly what each image has are those of a constant
        needed = (needed | {"state dict", "dtype"}) - {"identity"}
    return needed


def test_supported_has_one_entry_a_case() -> None:
    found = supported()
    assert isinstance(found, SupportMatrix)
    cases = sorted((case.family, case.variant) for case in CASES)
    assert sorted((entry.family, entry.mode) for entry in found) == cases, REWRITE


A, B = ("transformers 4.57.6", "transformers 5.0.0")
ROWS = [
    {
        "library": "transformers",
        "version": "4.57.6",
        "passed": [
            {"families": ["a", "b"], "modes": {"set_mean": ["x", "y"], "set_zero": ["x"]}},
        ],
    },
    {
        "library": "transformers",
        "version": "5.0.0",
        "passed": [
            {"families": ["a"], "modes": {"set_mean": ["y", "z"]}},
            {"families": ["new"], "modes": {"set_zero": ["x"]}},
        ],
    },
    {
        "library": "timm",
        "version": "1.0",
        "passed": [{"families": ["c"], "modes": {"set_zero": ["x"]}}],
    },
]


def test_every_version_of_a_library_stands_in_every_entry() -> None:
    entries = matrix(ROWS)
    assert entries == (
        Support("a", "set_mean", (Run(A, ("x", "y")), Run(B, ("y", "z")))),
        Support("a", "set_zero", (Run(A, ("x",)), Run(B, None))),
        Support("b", "set_mean", (Run(A, ("x", "y")), Run(B, None))),
        Support("b", "set_zero", (Run(A, ("x",)), Run(B, None))),
        Support("new", "set_zero", (Run(A, None), Run(B, ("x",)))),
        Support("c", "set_zero", (Run("timm 1.0", ("x",)),)),
    )
    assert [entry.checks for entry in entries] == [("y",), ("x",), ("x", "y"), *[("x",)] * 3]
    assert [entry.versions for entry in entries[:2]] == [(A, B), (A,)]
    assert [entry.not_run for entry in entries[3:]] == [(B,), (A,), ()]


def test_table_and_frame() -> None:
    text = str(matrix(ROWS))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[4:] == [
        "a transformers 4.57.6 2 set_mean; 1 set_zero",
        "a transformers 5.0.0 2 set_mean; not run: set_zero",
        "b transformers 4.57.6 2 set_mean; 1 set_zero",
        "b transformers 5.0.0 not run",
        "new transformers 4.57.6 not run",
        "new transformers 5.0.0 1 set_zero",
        "c timm 1.0 1 set_zero",
        "",
    ]
    frame = matrix(ROWS).to_pandas()
    assert frame.to_dict("list") == {
        "family": ["a", "a", "b", "b", "new", "c"],
        "mode": ["set_mean", "set_zero", "set_mean", "set_zero", "set_zero", "set_zero"],
        "checks": [1, 1, 2, 1, 1, 1],
        "versions": [f"{A}, {B}", A, A, A, B, "timm 1.0"],
        "not_run": ["", B, B, B, A, ""],
    }


def test_versions_with_one_outcome_share_a_line() -> None:
    rows = [{**ROWS[0], "version": version} for version in ("4.57.6", "5.0.0")]
    lines = [" ".join(line.split()) for line in str(matrix(rows)).splitlines()]
    assert lines[4] == "a transformers 4.57.6, 5.0.0 2 set_mean; 1 set_zero"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one row of the installed version, 5.0.0, and one of another."""
    file = tmp_path / "support.json"
    group = {"families": ["llama"], "modes": {"set_mean": ["identity", "effect", "gone"]}}
    rows = [
        {"library": "transformers", "version": version, "passed": [group]}
        for version in ("4.57.6", "5.0.0")
    ]
    file.write_text(json.dumps(rows))
    monkeypatch.setattr(record, "FILE", file)
    monkeypatch.setattr(record, "version", lambda name: "5.0.0")
    monkeypatch.setattr(record.support, "read_rows", lambda: json.loads(file.read_text()))
    return file


def test_writing_changes_what_was_run_under_the_installed_version_and_nothing_else(
    recorded: Path,
) -> None:
    old, _ = json.loads(recorded.read_text())
    passed = {("llama", "set_mean", "unpatch"), ("gpt2", "set_zero", "effect")}
    record.write(passed, failed={("llama", "set_mean", "effect")})
    first, second = json.loads(recorded.read_text())
    assert first == old
    assert (second["library"], second["version"]) == ("transformers", "5.0.0")
    assert record.listed([second]) == passed | {("llama", "set_mean", "identity")}


def test_writing_the_whole_battery_groups_equal_families(recorded: Path) -> None:
    checks = {(case.family, case.variant, "unpatch") for case in CASES}
    record.write(checks, failed={("llama", "set_mean", c) for c in ("identity", "effect")})
    _, *rows = json.loads(recorded.read_text())
    assert [row["library"] for row in rows] == list(dict.fromkeys(record.LIBRARIES.values()))
    kinds = [(row["library"], sorted(group["modes"])) for row in rows for group in row["passed"]]
    assert all(kinds.count(kind) == 1 for kind in kinds)
    assert record.listed(rows) == checks


def test_a_version_of_which_nothing_passed_gets_no_row(recorded: Path) -> None:
    before = json.loads(recorded.read_text())
    record.write(set(), failed={("llama", "set_mean", c) for c in ("identity", "effect")})
    assert json.loads(recorded.read_text()) == before[:1]


def test_a_family_that_the_installed_library_does_not_have_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cases.SINCE, "llama", "999.0")
    assert marks_of(Case("gpt2", "set_mean")) == []
    assert marks_of(Case("llama", "set_mean")) == [
        ("skip", {"reason": "llama is in the battery with transformers 999.0 or newer"})
    ]


def test_pairs_for_which_others_stand_are_long() -> None:
    assert marks_of(Case("llama", "noise")) == marks_of(Case("opt", "set_mean")) == []
    assert marks_of(Case("opt", "noise")) == [("long", {})]
    assert marks_of(Case("mixtral", "set_mean")) == [("long", {})]


def test_objects_are_checked_on_one_family_of_each_library() -> None:
    assert marks_of(Case("opt", "set_mean"), cases.OBJECTS) == [("long", {})]
    assert marks_of(Case("gpt2", "set_mean"), cases.OBJECTS) == []


def marks_of(case: Case, families: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    (parameter,) = cases.parametrize([case], families).args[1]
    assert parameter.values == (case,)
    return [(mark.name, mark.kwargs) for mark in parameter.marks]


@pytest.mark.parametrize("option", [True, False])
def test_a_check_is_recorded_if_all_its_ways_passed(
    option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_passed", "_failed"):
        monkeypatch.setattr(conftest, name, set())
    written: list[tuple[set[record.Check], set[record.Check]]] = []
    monkeypatch.setattr(conftest, "write", lambda *checks: written.append(checks))

    def report(check: str, when: str, passed: bool) -> None:
        properties = [("other", 1), ("check", ["llama", "noise", check])]
        ran: Any = SimpleNamespace(user_properties=properties, when=when, passed=passed)
        conftest.pytest_runtest_logreport(ran)

    for check, when, passed in (
        ("dtype", "call", True),
        ("dtype", "call", False),
        ("effect", "call", True),
        ("effect", "call", True),
        ("stack", "call", True),
        ("stack", "teardown", False),
        ("pickle", "setup", True),
    ):
        report(check, when, passed)
    config = SimpleNamespace(getoption=lambda name, default: option)
    conftest.pytest_sessionfinish(SimpleNamespace(config=config))  # type: ignore[arg-type]
    passed = {("llama", "noise", "effect")}
    failed = {("llama", "noise", "dtype"), ("llama", "noise", "stack")}
    assert written == ([(passed, failed)] if option else [])
