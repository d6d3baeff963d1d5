"""The table and the curve of runs of `distill_sinks.py`.

    python examples/plot_distill_sinks.py runs/logit runs/kv --out examples/results/distill_sinks

Writes OUT.json and, with matplotlib (extra `report`), OUT.png; prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("perplexity", "evicted", "largest")


def read_run(folder: Path) -> dict[str, Any]:
    """One run: its config, where it began from, and every evaluation."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    config = json.loads((folder / "config.json").read_text())
    return {
        "config": config | {"model": Path(config["model"]).name},
        "baselines": json.loads((folder / "baselines.json").read_text()),
        "log": [json.loads(line) for line in lines],
    }


def name_of(config: dict[str, Any]) -> str:
    """What is trained."""
    trained = {"sink_logit": "one logit a head", "kv": "k', v' from random ones"}[config["kind"]]
    return trained + (f" and LoRA of rank {config['lora']}" if config["lora"] else "")


def rows_of(runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The baselines once, then first and last of every run."""
    rows = list(runs[0]["baselines"].items())
    for run in runs:
        name = name_of(run["config"])
        first, last = run["log"][0], run["log"][-1]
        if run["config"]["kind"] == "sink_logit" and not run["config"]["lora"]:
            rows.append((f"{name}, fitted to k'", first))
        rows.append((f"{name}, {last['step']} steps", last))
    return rows


def number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def print_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    print("| | perplexity | start token evicted | largest magnitude |")  # noqa: T201
    print("| --- | ---: | ---: | ---: |")  # noqa: T201
    for name, row in rows:
        cells = " | ".join(number(row[column]) for column in COLUMNS)
        print(f"| {name} | {cells} |")  # noqa: T201


def curve(runs: list[dict[str, Any]], file: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    for ax, column, title in zip(axes, COLUMNS, ("perplexity", "start token evicted")):
        for run in runs:
            steps = [line["step"] for line in run["log"]]
            values = [line[column] for line in run["log"]]
            ax.plot(steps, values, "o-", label=name_of(run["config"]))
        for style, (name, row) in zip(("k-", "k:", "k--"), runs[0]["baselines"].items()):
            ax.axhline(row[column], color="k", linestyle=style[1:], linewidth=0.8, label=name)
        ax.set(xlabel="step", title=title, yscale="log")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", required=True, help="what the names of the files begin with")
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.runs]
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{arguments.out}.json").write_text(json.dumps(runs, indent=1) + "\n")
    print_table(rows_of(runs))
    import matplotlib

    matplotlib.use("Agg")
    curve(runs, f"{arguments.out}.png")


if __name__ == "__main__":
    main()
