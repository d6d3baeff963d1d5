"""Figures and table of the runs of `train_gpt2_attention_bias.py`.

    python examples/plot_gpt2_attention_bias.py runs/backcopy --out examples/results/backcopy

OUT_figure9.png: magnitudes of one sequence's hidden state, token x channel, at the layer where the
default model's largest one is. OUT_figure10.png: the three largest magnitudes and the median at
each layer's output. OUT_growth.png: the largest through training. (Sun et al. 2024, figures 9 and
10.) OUT.json: one row a run, its last evaluation; printed as a table. OUT_curves.json and .png: the
largest and the median magnitude and the loss at every evaluation of the first run of each way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from backcopy import START, Backcopy
from train_gpt2_attention_bias import WAYS, Config, Task, draw, inputs, task_of
from transformers import GPT2LMHeadModel

import biassurgery as bs

SHOWN = 16  # tokens in figure 9
TITLES = {
    "default": "GPT-2, default",
    "sink": "GPT-2 with a sink token",
    "bias": "GPT-2 with explicit attention biases",
}


def read_runs(folder: Path) -> dict[str, list[Path]]:
    """The finished runs of each way, in the order of their seeds."""
    found = {
        way: sorted(run for run in folder.glob(f"{way}-*") if (run / "model").is_dir())
        for way in WAYS
    }
    return {way: runs for way, runs in found.items() if runs}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def row(run: Path) -> dict[str, Any]:
    """The last evaluation of a run in a few numbers; of magnitudes and attention, those of each
    layer.
    """
    config = json.loads((run / "config.json").read_text())
    last = lines(run)[-1]
    top = [layer[0] for layer in last["top"]]
    strongest = [max(range(len(shares)), key=shares.__getitem__) for shares in last["share"]]
    return {
        "way": config["way"],
        "seed": config["seed"],
        "step": last["step"],
        "loss": last["loss"],
        **{name: last[name] for name in ("excess_trigger", "excess_other") if name in last},
        "top_1": top,
        "median": last["median"],
        "ratio": [round(t / m) for t, m in zip(top, last["median"])],
        "first": last["first"],
        "rest": last["rest"],
        **({"by_token": by_token(run, len(top) - 1)} if config["task"] == "backcopy" else {}),
        "massive_layers": sorted({layer for layer, _, _ in last["massive"]}),
        "sink_share": [shares[head] for shares, head in zip(last["share"], strongest)],
        "sink_position": [positions[head] for positions, head in zip(last["position"], strongest)],
        "bias_share": [max(shares) for shares in last["bias_share"]],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(name for name in rows[0]))
    for each in rows:
        table.add_row(
            *(
                " ".join(f"{v:.3g}" for v in value) if isinstance(value, list) else str(value)
                for value in each.values()
            )
        )
    Console(width=220).print(table)


def final_model(run: Path) -> GPT2LMHeadModel:
    """The trained model, explicit biases included."""
    model = GPT2LMHeadModel.from_pretrained(run / "model")
    return (
        bs.load_patch(model, run / "model") if (run / "model" / "surgery.json").is_file() else model
    )


@torch.no_grad()
def hidden_states(run: Path, rows: int, layer: int) -> tuple[torch.Tensor, torch.Tensor, Task]:
    """Held-out sequences as the model reads them (rows, T), magnitudes at a block's output (rows,
    T, width), and the task.
    """
    written = json.loads((run / "config.json").read_text())
    way = written.pop("way")
    _ = written.pop("seed")
    config = Config(**written)
    task = task_of(config)
    model = final_model(run).eval()
    read = inputs(draw(task, rows, config, seed=-1, held_out=True), task.tokens, way)
    with bs.record(model, what=("block_output",), layers=[layer]) as seen:
        model(input_ids=read)
    return read, seen["block_output"][layer].abs(), task


def by_token(run: Path, layer: int) -> dict[str, float]:
    """Largest magnitude of a token of the backcopy task at a block's output, mean over tokens of a
    kind.
    """
    read, magnitude, task = hidden_states(run, 64, layer)
    assert isinstance(task, Backcopy)
    largest = magnitude.amax(-1)
    is_trigger = task.trigger[read.clamp(max=task.tokens - 1)]
    kinds = {
        "start": read == START,
        "trigger": is_trigger,
        "ordinary": (read != START) & (read < task.tokens) & ~is_trigger,
    }
    return {kind: round(largest[where].mean().item(), 1) for kind, where in kinds.items()}


def panels(runs: dict[str, list[Path]], **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel a way: (figure, axes of each way)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 3.4), squeeze=False, layout="constrained", **kwargs
    )
    for way, ax in zip(runs, axes[0]):
        ax.set_title(TITLES[way], fontsize=10)
    return figure, dict(zip(runs, axes[0]))


def figure9(runs: dict[str, list[Path]], out: str) -> None:
    top = [layer[0] for layer in lines(next(iter(runs.values()))[0])[-1]["top"]]
    layer = top.index(max(top))
    shown = {way: hidden_states(each[0], 1, layer)[1][0, :SHOWN] for way, each in runs.items()}
    figure, axes = panels(runs, subplot_kw={"projection": "3d"})
    for way, ax in axes.items():
        token, channel = (
            grid.flatten().numpy()
            for grid in torch.meshgrid(*(torch.arange(n) for n in shown[way].shape), indexing="ij")
        )
        ax.bar3d(
            channel,
            token,
            0,
            0.6,
            0.2,
            shown[way].flatten().numpy(),
            color="royalblue",
            shade=False,
        )
        ax.set(
            xlabel="channel", ylabel="token", zlim=(0, max(z.max().item() for z in shown.values()))
        )
    figure.suptitle(f"magnitudes at the output of layer {layer}", fontsize=10)
    figure.savefig(f"{out}_figure9.png", dpi=64)


def figure10(runs: dict[str, list[Path]], out: str) -> None:
    figure, axes = panels(runs, sharey=True)
    for way, ax in axes.items():
        last = [lines(run)[-1] for run in runs[way]]
        curves = {
            f"top {i + 1}": [[top[i] for top in line["top"]] for line in last] for i in range(3)
        }
        for name, values in {**curves, "median": [line["median"] for line in last]}.items():
            mean, *_ = ax.plot(
                torch.tensor(values).mean(0).numpy(),
                "o-" if name in curves else "k.--",
                label=name,
                markersize=4,
            )
            for each in values:
                ax.plot(each, ".", color=mean.get_color(), alpha=0.3)
        ax.set(xlabel="layer", yscale="log", xticks=range(len(last[0]["median"])))
        ax.legend(fontsize=7)
    figure.supylabel("magnitude at the layer's output", fontsize=9)
    figure.savefig(f"{out}_figure10.png", dpi=80)


def growth(runs: dict[str, list[Path]], out: str) -> None:
    figure, axes = panels(runs, sharey=True)
    for way, ax in axes.items():
        for run in runs[way]:
            logged = lines(run)
            steps = [line["step"] for line in logged]
            largest, *_ = ax.plot(
                steps, [max(top[0] for top in line["top"]) for line in logged], label=run.name
            )
            ax.plot(steps, [max(line["first"]) for line in logged], ":", color=largest.get_color())
        ax.set(xlabel="step")
        ax.legend(fontsize=7)
    figure.supylabel("largest magnitude; dotted: on the first token", fontsize=9)
    figure.savefig(f"{out}_growth.png", dpi=80)


def curves_of(runs: dict[str, list[Path]]) -> dict[str, list[dict[str, float]]]:
    """A row an evaluation of the first run of each way.

    Magnitudes are of the layer with the largest value at the time.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for way, each in runs.items():
        for line in lines(each[0]):
            tops = [top[0] for top in line["top"]]
            largest = max(tops)
            median = line["median"][tops.index(largest)]
            row = {"step": line["step"], "loss": line["loss"], "top_1": largest, "median": median}
            rows.setdefault(TITLES[way], []).append(row)
    return rows


def curves(runs: dict[str, list[Path]], out: str) -> None:
    rows = curves_of(runs)
    Path(f"{out}_curves.json").write_text(json.dumps(rows, indent=1) + "\n")
    bs.plots.training_curves(rows).savefig(f"{out}_curves.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--out", required=True, help="what the names of the written files begin with"
    )
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    runs = read_runs(arguments.runs)
    if not runs:
        raise SystemExit(f"runs: {arguments.runs} holds no finished run; train one first.")
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    rows = [row(run) for way in runs.values() for run in way]
    Path(f"{arguments.out}.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print_table(rows)
    figure9(runs, arguments.out)
    figure10(runs, arguments.out)
    growth(runs, arguments.out)
    curves(runs, arguments.out)


if __name__ == "__main__":
    main()
