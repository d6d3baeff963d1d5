"""Turn the published measurements into the packaged asset: one line a run, one value a site.

    python training/distil_published_sites.py SOURCE.json
    src/biassurgery/assets/published_sites.json

`biassurgery.findings.published` says which values are taken and which are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MASSIVE = 100.0  # the magnitude in the definition of the published runs

# Checkpoint -> (config.model_type, or None where a checkpoint loads as either of two; whether its
# tokenizer prepends BOS by default).
CHECKPOINTS: dict[str, tuple[str | None, bool]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", True),
    "meta-llama/Llama-3.2-1B": ("llama", True),
    "meta-llama/Llama-3.2-3B": ("llama", True),
    "mistralai/Mistral-7B-v0.3": ("mistral", True),
    "allenai/OLMo-2-1124-7B": ("olmo2", False),
    "allenai/OLMo-7B-0724-hf": ("olmo", False),
    "tiiuae/falcon-11B": ("falcon", False),
    "tiiuae/falcon-7b": ("falcon", False),
    "google/gemma-2-2b": ("gemma2", True),
    "google/gemma-2-9b": ("gemma2", True),
    "google/gemma-3-12b-pt": (None, True),
    "google/gemma-3-1b-pt": ("gemma3_text", True),
    "google/gemma-3-4b-pt": (None, True),
    "google/gemma-7b": ("gemma", True),
    "openai-community/gpt2": ("gpt2", False),
    "facebook/opt-6.7b": ("opt", True),
    "microsoft/phi-2": ("phi", False),
    "microsoft/phi-4": ("phi3", False),
}


def distil(run: dict[str, Any]) -> dict[str, Any]:
    """What the library needs of one run."""
    architecture, default = CHECKPOINTS[run["checkpoint"]]
    kept = []
    left_out = []
    for site in run["sites"]:
        value = nearest(site["fill_values"], site["observed_mean"])
        mean = site["observed_mean"]
        row = [
            site["layer"],
            site["channel"],
            site["role"],
            value,
            mean,
            site["observed_std"],
            site["observed_count"],
        ]
        seen = mean / value >= 0.5  # also false where the signs differ
        (kept if seen and abs(value) > MASSIVE else left_out).append(row)
    return {
        "checkpoint": run["checkpoint"],
        "architecture": architecture,
        "bos": run["bos_prepended"],
        "bos_by_default": default,
        "context_length": run["context_length"],
        "dtype": run["dtype"],
        "layers": run["layers_with_massive_activations"],
        "perplexity": {
            kind: {text: float(f"{value:.5g}") for text, value in texts.items()}
            for kind, texts in run["perplexity"].items()
        },
        "sites": kept,
        "left_out": left_out,
    }


def nearest(values: list[float], target: float) -> float:
    return min(values, key=lambda value: abs(value - target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("asset", type=Path)
    arguments = parser.parse_args()
    published = json.loads(arguments.source.read_text())
    header = {
        "source": published["source"],
        "massive": published["conventions"]["massive"],
        "site": [
            "layer",
            "channel",
            "role",
            "value",
            "observed_mean",
            "observed_std",
            "observed_count",
        ],
        "sun_2024": published["sun_2024"],
    }
    lines = [json.dumps(distil(run), separators=(",", ":")) for run in published["runs"]]
    body = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
        for name, value in header.items()
    )
    arguments.asset.write_text("{\n" + body + ',\n"runs": [\n' + ",\n".join(lines) + "\n]\n}\n")


if __name__ == "__main__":
    main()
