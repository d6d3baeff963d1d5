"""Every table and figure of Sun et al. 2024 that is about one language model, drawn for yours.

    python examples/paper_figures.py MODEL --out figures

MODEL is what `biassurgery report` takes, and is read on packaged text: 8 windows of 128 tokens to
find in, 8 others to evaluate on. About two minutes on a core for SmolLM2; docs/paper.md says what
each file shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.packaged import packaged_text, text_batches

WINDOWS = 8
SHOWN = 40  # tokens of the sequence that is drawn
MODES = (None, "set_zero", "set_mean", "zero_random")


def figures(model: Any, tokenizer: Any, length: int = 128, **definition: float) -> Iterator[Any]:
    """Names and figures, in the order of the paper."""
    found_in, evaluated_on = (
        torch.cat(text_batches(tokenizer, packaged_text(name), length))[:WINDOWS].split(4)
        for name in ("calibration", "evaluation")
    )
    one = found_in[0][:1, :SHOWN]
    words = tokenizer.convert_ids_to_tokens(one[0].tolist())
    found = bs.detect(model, found_in, **definition)
    tables = bs.evaluate.hidden_state_tables(model, found_in, tokenizer=tokenizer, **definition)
    yield (
        "figure1_states",
        bs.plots.activations_3d(state_of(model, one, tables.layer), tokens=words),
    )
    yield "table1_magnitudes", bs.plots.magnitude_table(tables.magnitudes)
    yield "figure4_blocks", bs.plots.magnitudes(found)
    if tables.carriers.rows:
        yield "tokens", bs.plots.carriers(tables.carriers)
    yield (
        "outlier_features",
        bs.plots.outlier_features(bs.evaluate.channel_table(model, found_in, **definition)),
    )
    yield "table2_variation", bs.plots.variation_table(tables.variation)
    if found.sites:
        yield (
            "table3_interventions",
            bs.plots.interventions(
                bs.compare(
                    model,
                    lambda host: {"perplexity": bs.perplexity(host, evaluated_on)},
                    MODES,
                    sites=found.sites,
                )
            ),
        )
    yield from attention_figures(model, one, words, tables.layer)
    yield "sinks", bs.plots.sink_kinds(bs.evaluate.sink_kinds(model, found_in))
    diagnosis = bs.diagnose(model, found_in, **definition)
    if diagnosis.sites:
        life = bs.evaluate.value_life(model, found_in, diagnosis)
        yield "life_of_a_value", bs.plots.value_life(life)


def state_of(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """(T, D): a block's output for one sequence."""
    with bs.record(model, "block_output", layers=[layer]) as rec, torch.no_grad():
        model(ids)
    return rec["block_output"][layer][0]


def attention_figures(model: Any, ids: torch.Tensor, words: list[str], layer: int) -> Iterator[Any]:
    """Figures 5, 6 and 7, and the decomposition of section 4.2, around a block."""
    last = model.config.num_hidden_layers - 1
    behind = min(last, layer + 2)
    around = sorted({0, max(0, layer - 1), layer, behind})
    logits = bs.evaluate.mean_attention_logits(model, ids, around)
    yield "figure5_logits", bs.plots.attention_logits(logits)
    what = ("block_input", "norm_output", "q", "k", "v", "value_updates")
    with bs.record(model, what, layers=[behind]) as rec, torch.no_grad():
        model(ids)
    yield "figure7_trajectory", bs.plots.trajectory(rec, behind, tokens=words)
    yield "value_updates", bs.plots.value_updates(rec, behind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument("--min-ratio", type=float, default=1000.0)
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"))
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype="float32")
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = figures(loaded.model, loaded.tokenizer, arguments.length, min_ratio=arguments.min_ratio)
    for name, figure in drawn:
        file = arguments.out / f"{name}.{arguments.format}"
        figure.savefig(file, dpi=100)
        print(file)  # noqa: T201  (a script)


if __name__ == "__main__":
    main()
