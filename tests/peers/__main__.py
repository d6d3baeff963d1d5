"""`python -m tests.peers`: transformers' own model tests on patched models.

They run once unpatched and once under each variant; what passes unpatched must pass patched.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from tests.peers.inside.testers import FAMILIES
from tests.peers.running import VARIANTS, Outcomes, run

# Tests that hold for a model without added parameters only, and why.
BY_DESIGN = {
    "test_init_weights_can_init_buffers": "compares with a model without weights, not patched",
    "test_model_weights_reload_no_missing_tied_weights": (
        "a checkpoint has no added parameters; load_patch brings them"
    ),
}


def differences(plain: Outcomes, patched: Outcomes) -> dict[str, str]:
    """The tests that pass unpatched and not patched, with their errors."""
    return {
        name: patched.get(name, ("missing", "did not run"))[1] or "skipped"
        for name, (outcome, _) in plain.items()
        if outcome == "passed" and patched.get(name, ("missing", ""))[0] != "passed"
    }


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("-k", dest="select", default="", help="as pytest's")
    chosen = parser.parse_args()
    say(f"transformers {version('transformers')}: tests/test_modeling_common.py")
    worst = 0
    for family in chosen.family or FAMILIES:
        plain = run(family, "unpatched", chosen.select)
        passed = sum(outcome == "passed" for outcome, _ in plain.values())
        say(f"{family:10} unpatched     {passed:4} passed")
        for variant in chosen.variant or VARIANTS:
            found = differences(plain, run(family, variant, chosen.select))
            unexplained = {name: why for name, why in found.items() if name not in BY_DESIGN}
            worst = max(worst, bool(unexplained))
            say(f"{family:10} {variant:13} {passed - len(found):4} passed")
            for name, why in found.items():
                say(f"    {name}: {BY_DESIGN.get(name, why)[:200]}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
