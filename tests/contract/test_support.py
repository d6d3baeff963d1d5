"""The support matrix says what the battery does, no more and no less."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from biassurgery.modes import MODES
from biassurgery.support import Support, SupportMatrix, matrix, read_runs, supported
from tests.contract import conftest, record
from tests.contract.cases import CASES, NOT_OFFLOADABLE, TYPICAL, VARIANTS, Case

REWRITE = (
    "run `pytest tests/contract --write-support` in an environment of each supported version of"
    " transformers"
)


def test_the_battery_takes_every_mode() -> None:
    ours = {name for name, mode in MODES.items() if mode.__module__.startswith("biassurgery.")}
    assert {mode for mode, _ in VARIANTS.values()} == ours


def test_the_file_lists_nothing_that_the_battery_does_not_run() -> None:
    assert record.listed(read_runs()) - record.battery() == set(), REWRITE


def test_everything_that_the_battery_runs_is_in_the_file() -> None:
    assert record.battery() - record.listed(read_runs()) == set(), REWRITE


def test_every_case_passed_under_both_generations_of_transformers() -> None:
    for entry in supported():
        if entry.versions[0].startswith("transformers"):
            assert [v.split()[1].split(".")[0] for v in entry.versions] == ["4", "5"], entry
        needed = {"identity", "effect", "unpatch", "autocast", "offload patched"}
        if Case(entry.family, entry.mode).on_attention:  # see `TYPICAL`
            needed |= {"state dict", "dtype"}
            needed -= {"offload patched"} if entry.mode not in TYPICAL else set()
            needed -= (
                {"identity"} if entry.mode == "attention_bias off_by_one" else set()
            )  # it cannot be without effect
        if entry.family in NOT_OFFLOADABLE:
            needed -= {"offload patched"}
        if Case(entry.family, entry.mode).on_registers:
            needed = (needed | {"state dict", "dtype"}) - {
                "identity"
            }  # means that are exactly what each image has are those of a constant
        if Case(entry.family, entry.mode).on_tokens:
            needed = {
                "unpatch",
                "state dict",
                "pickle",
                "save patch",
                "failure half way",
            }  # numbers: tests/edits/test_added_token.py
        assert needed <= set(entry.checks), entry


def test_supported_has_one_entry_a_case() -> None:
    found = supported()
    assert isinstance(found, SupportMatrix)
    assert sorted((s.family, s.mode) for s in found) == sorted((c.family, c.variant) for c in CASES)


RUNS = [
    {
        "versions": {"transformers": "4.57.6", "timm": "1.0"},
        "passed": [
            {
                "library": "transformers",
                "families": ["a", "b"],
                "modes": {"set_mean": ["x", "y"], "set_zero": ["x"]},
            }
        ],
    },
    {
        "versions": {"transformers": "5.0.0", "timm": "1.0"},
        "passed": [
            {"library": "transformers", "families": ["a"], "modes": {"set_mean": ["y", "z"]}},
            {"library": "timm", "families": ["c"], "modes": {"set_zero": ["x"]}},
        ],
    },
]


def test_a_check_counts_if_it_passed_under_every_version() -> None:
    both = ("transformers 4.57.6", "transformers 5.0.0")
    assert matrix(RUNS) == (
        Support("a", "set_mean", ("y",), both),
        Support("a", "set_zero", ("x",), both[:1]),
        Support("b", "set_mean", ("x", "y"), both[:1]),
        Support("b", "set_zero", ("x",), both[:1]),
        Support("c", "set_zero", ("x",), ("timm 1.0",)),
    )


def test_table_and_frame() -> None:
    text = str(matrix(RUNS))
    assert [
        line.split() for line in text.splitlines() if line.strip().startswith(("a ", "b ", "c "))
    ] == [
        ["a", "1", "1", "transformers", "4.57.6,", "5.0.0"],
        ["b", "2", "1", "transformers", "4.57.6"],
        ["c", "1", "timm", "1.0"],
    ]
    frame = matrix(RUNS).to_pandas()
    assert frame.to_dict("list") == {
        "family": ["a", "a", "b", "b", "c"],
        "mode": ["set_mean", "set_zero", "set_mean", "set_zero", "set_zero"],
        "checks": [1, 1, 2, 1, 1],
        "versions": [
            "transformers 4.57.6, transformers 5.0.0",
            *["transformers 4.57.6"] * 3,
            "timm 1.0",
        ],
    }


def test_writing_replaces_the_run_of_the_same_version_and_groups_equal_families(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "support.json"
    monkeypatch.setattr(record, "FILE", file)
    monkeypatch.setattr(record, "version", lambda name: "5.0.0")
    monkeypatch.setattr(record.support, "read_runs", lambda: RUNS)
    checks = {(case.family, case.variant, "x") for case in CASES}
    record.write(checks)
    old, new = json.loads(file.read_text())
    assert old == RUNS[0]
    assert new["versions"] == dict.fromkeys(
        ("transformers", "timm", "open_clip_torch", "torch"), "5.0.0"
    )
    assert {group["library"] for group in new["passed"]} == {case.library for case in CASES}
    kinds = [(group["library"], sorted(group["modes"])) for group in new["passed"]]
    assert all(kinds.count(kind) == 1 for kind in kinds)
    assert record.listed([new]) == checks


@pytest.mark.parametrize("option", [True, False])
def test_a_check_is_recorded_if_all_its_ways_passed(
    option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_passed", "_failed"):
        monkeypatch.setattr(conftest, name, set())
    written: list[set[record.Check]] = []
    monkeypatch.setattr(conftest, "write", written.append)

    def report(check: str, when: str, passed: bool) -> None:
        properties = [("other", 1), ("check", ["llama", "noise", check])]
        conftest.pytest_runtest_logreport(
            SimpleNamespace(user_properties=properties, when=when, passed=passed)
        )  # type: ignore[arg-type]

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
    assert written == ([{("llama", "noise", "effect")}] if option else [])
