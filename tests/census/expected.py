"""The committed outcome of the census, one file for each major version of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.census.examine import Verdict

MAJOR = int(transformers.__version__.split(".")[0])
FILE = Path(__file__).parent / f"transformers_{MAJOR}.json"
MODES = ("kv", "transplant")
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read() -> dict[str, Any]:
    """`not_built`, `not_served`, `attention_not_served`: reasons by type, and the `transformers`
    version that they were found with; `kv`, `transplant`: what becomes of them in the situations
    of `situations.py`, for every type that is served.
    """
    return json.loads(FILE.read_text())


def write(verdicts: dict[str, Verdict], cells: dict[str, dict[str, str]]) -> None:
    """Replace the committed outcome of this major version.

    Args:
        verdicts: of `examine`, by type.
        cells: of `situations`, by type.
    """
    reasons = {
        built: {name: v.reason for name, v in verdicts.items() if v.reason and v.built is built}
        for built in (False, True)
    }
    attention = {name: v.attention for name, v in verdicts.items() if v.attention}
    found = {
        "transformers": transformers.__version__,
        "not_built": reasons[False],
        "not_served": reasons[True],
        "attention_not_served": attention,
        **{mode: {name: cell[mode] for name, cell in cells.items()} for mode in MODES},
    }
    FILE.write_text(json.dumps(found, indent=2) + "\n")


def share(not_built: int, not_served: int) -> tuple[int, int, float]:
    """How many types were built, how many of them are served, and their share in percent."""
    built = len(TYPES) - not_built
    return built, built - not_served, 100 * (built - not_served) / built
