"""`pytest tests/contract --write-support` records what passed, for `biassurgery.supported()`."""

from __future__ import annotations

import pytest

from tests.contract.record import Check, check_of, write

_passed: set[Check] = set()
_failed: set[Check] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support",
        action="store_true",
        help="record what passed in src/biassurgery/assets/support.json",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        case = item.callspec.params.get("case")
        if case is not None and item.path.parent.name == "contract":
            check = (case.family, case.variant, check_of(item.originalname))
            item.user_properties.append(("check", check))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, check in report.user_properties:
        if name == "check":  # one that is run in several ways passes if all of them do
            if report.when == "call" and report.passed:
                _passed.add(tuple(check))  # type: ignore[arg-type]
            elif not report.passed:
                _failed.add(tuple(check))  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("write_support", default=False) and not hasattr(
        session.config, "workerinput"
    ):
        write(_passed - _failed, _failed)
