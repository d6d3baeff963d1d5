"""Perplexity of a stream that is longer than the cache: sinks, transplanted biases, neither.

python benchmarks/streaming.py                       # the packaged checkpoint, four minutes
python benchmarks/streaming.py --model smollm2       # or gemma3, once fetched: some minutes

The second form leaves out what is recomputed, which a large window makes long.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import biassurgery as bs
from biassurgery.cli.demo import load_demo_model
from biassurgery.data.loading import load_model
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.data.real_models import REAL_MODELS, model_folder
from biassurgery.data.windows import tokenize

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(REAL_MODELS))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model is None:
        model, tokenizer = load_demo_model()
        windows: tuple[int, ...] = WINDOWS
    else:
        loaded = load_model(str(model_folder(options.model)), device="cpu")
        model, tokenizer = loaded.model, loaded.tokenizer
        windows = (options.window,)
    show(model, tokenizer, windows, options.tokens, again=options.model is None)


def show(model: Any, tokenizer: Any, windows: tuple[int, ...], tokens: int, again: bool) -> None:
    """Print a table, a row a window; `again`: with what is recomputed for every prediction."""
    start = tokenizer.bos_token_id
    length = min(256, model.config.max_position_embeddings)
    text = torch.cat(text_batches(tokenizer, packaged_text("calibration"), length))
    known = torch.cat([torch.full((len(text), 1), start), text[:, 1:]], 1)
    key_values = bs.calibrate_key_values(model, [known])
    stream = tokenize(tokenizer, packaged_text("evaluation"))[:tokens]
    behind_start = torch.cat([torch.tensor([start]), stream])
    names = ("start token, recomputed", "recomputed") if again else ()
    table = Table("window", *names, "sinks=0", "sinks=1", "sinks=4", "transplant, sinks=0")
    for window in windows:
        row = [recomputed(model, stream, window, front) for front in ([start], []) if again]
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
