"""The libraries' own tests on patched models: what is written about them, and a thin run."""

from __future__ import annotations

import pytest

from tests.peers import report
from tests.peers.libraries import LIBRARIES, VARIANTS
from tests.peers.running import Outcome, run
from tests.peers.sdist import Absent

THIN = (
    "test_attention_outputs or test_hidden_states_output or test_model_outputs_equivalence"
    " or test_resize or test_gradient_checkpointing or test_save_load or test_greedy or test_beams"
    " or test_left_padding or test_retain_grad or test_training"
)


def outcome(kind: str, patched: bool = True) -> Outcome:
    return Outcome(kind, "" if kind == "passed" else "an error", patched)


def test_what_passes_unpatched_only_is_a_difference() -> None:
    plain = {name: outcome("passed", False) for name in ("a", "b", "c", "d", "e")}
    plain |= {"fails anyway": outcome("failed", False), "skips anyway": outcome("skipped", False)}
    patched = {
        "a": outcome("passed"),
        "b": outcome("failed"),
        "c": outcome("skipped"),
        "d": outcome("passed", patched=False),
        "fails anyway": outcome("failed"),
        "skips anyway": outcome("failed"),
    }
    found = report.compare(plain, patched)
    assert found.differences == {"b": "an error", "c": "an error", "e": "did not run"}
    assert found.of == 4  # a test that patched no model shows nothing


def test_only_a_named_difference_is_explained() -> None:
    by_design = "test_model_weights_reload_no_missing_tied_weights"
    found = report.Family(
        "transformers",
        "5",
        "llama",
        {"zero_effect": report.Count(2, {f"test_families::{by_design}": "an error"})},
    )
    assert not found.unexplained
    assert "1 / 2" in found.text()
    found.counts["out_of_reach"] = report.Count(2, {f"test_families::{by_design}": "an error"})
    assert found.unexplained  # nothing is added there
    found.counts["out_of_reach"] = report.Count(2, {"test_families::test_attention_outputs": "why"})
    assert found.unexplained
    assert "why" in found.text()


def test_the_document_is_what_was_found() -> None:
    assert report.DOCUMENT.read_text() == report.document()


def test_every_difference_that_was_found_is_explained() -> None:
    families = list(report.read())
    assert families
    for family in families:
        assert family.family in LIBRARIES[family.library].families
        assert set(family.counts) == set(VARIANTS)
        assert all(count.of for count in family.counts.values())
        assert not family.unexplained, family.text()


@pytest.mark.long
def test_tests_of_llama_pass_under_instrument() -> None:
    try:
        plain = run("transformers", "llama", "unpatched", THIN)
        patched = run("transformers", "llama", "instrument", THIN)
    except Absent as absent:
        pytest.skip(f"{absent}; with network: python -m tests.peers --family llama")
    found = report.compare(plain, patched)
    assert found.of > 10
    assert not found.differences
