"""Perplexity of a stream that is longer than the cache, on the packaged checkpoint: sinks,
transplanted biases, neither.

python benchmarks/streaming.py        # about four minutes on one core
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

import biassurgery as bs
from biassurgery.cli.demo import load_demo_model
from biassurgery.data.packaged import packaged_text, text_batches

TOKENS = 1000
WINDOWS = (16, 24, 31)


def recomputed(
    model: torch.nn.Module, stream: torch.Tensor, window: int, start: list[int]
) -> float:
    """Every token predicted from the `window` tokens before it, behind `start`, read anew."""
    rows = stream.unfold(0, window + 1, 1)
    rows = torch.cat([torch.tensor([start], dtype=torch.int64).expand(len(rows), -1), rows], 1)
    labels = rows.clone()
    labels[:, :-1] = -100
    return bs.perplexity(
        model, [{"input_ids": r, "labels": t} for r, t in zip(rows.split(64), labels.split(64))]
    )


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    start = tokenizer.bos_token_id
    key_values = bs.calibrate_key_values(
        model,
        text_batches(tokenizer, packaged_text("calibration"), model.config.max_position_embeddings),
    )
    stream = torch.tensor(
        tokenizer(packaged_text("evaluation"), add_special_tokens=False, verbose=False)["input_ids"]
    )[:TOKENS]
    behind_start = torch.cat([torch.tensor([start]), stream])

    table = Table(
        "window",
        "start token, recomputed",
        "recomputed",
        "sinks=0",
        "sinks=1",
        "sinks=4",
        "transplant, sinks=0",
    )
    for window in WINDOWS:
        row = [recomputed(model, stream, window, [start]), recomputed(model, stream, window, [])]
        for sinks in (0, 1, 4):  # the window holds as many other tokens as without a start token
            cache = bs.SinkCache(model, window + (sinks > 0), sinks)
            row.append(bs.streaming_perplexity(model, behind_start, cache, skip=window + 1))
        with bs.patched(model, "transplant", key_values=key_values):
            row.append(
                bs.streaming_perplexity(model, stream, bs.SinkCache(model, window, 0), skip=window)
            )
        table.add_row(str(window), *(f"{value:.2f}" for value in row))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
