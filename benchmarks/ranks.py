"""Weak scaling of `calibrate`: two processes with a share of data each, against one with one share.

    python benchmarks/ranks.py                   # a random LLaMA of 8 blocks
    python benchmarks/ranks.py --quick           # does it run at all? its numbers mean nothing
    python benchmarks/ranks.py --model FOLDER    # a causal LM of yours, random tokens

One pair of processes over gloo, one thread each, measures four things in turn in every repeat:

    one            the first calibrates its share, the other waits
    one again      the same: how far from 1 the noise goes
    two apart      both calibrate, each for itself (group=False): what the machine makes of two
    two together   both calibrate, and their sums are added up

Perfect weak scaling is `two together / one` = 1; `two together / two apart` is the library's part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from timing import interleaved, ratios
from torch import Tensor

import biassurgery as bs

WORLD = 2
ONE, AGAIN, APART, TOGETHER = "one", "one again", "two apart", "two together"
# what is divided by what
ROWS = ((AGAIN, ONE), (APART, ONE), (TOGETHER, ONE), (TOGETHER, APART))
VOCABULARY, LEVEL, CHANNEL = 4096, 2000.0, 7


def build(model: str | None, layers: int, width: int) -> Any:
    """A checkpoint, or a random LLaMA whose token 0 carries a massive activation."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    host: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )
    ).eval()
    with torch.no_grad():
        host.get_input_embeddings().weight[0, CHANNEL] = LEVEL
    return host


def share(rank: int, batches: int, length: int, vocabulary: int) -> list[Tensor]:
    """The data of one rank: batches (4, length) of random ids behind token 0."""
    ids = torch.randint(
        1, vocabulary, (4 * batches, length), generator=torch.Generator().manual_seed(rank)
    )
    ids[:, 0] = 0
    return list(ids.split(4))


def timers(model: Any, rank: int, mine: list[Tensor]) -> dict[str, Callable[[], float]]:
    """Seconds by the clock from when both are ready until both are done."""

    def calibrate(**group: Any) -> None:
        bs.calibrate(model, mine, progress=False, **group)

    def timed(ranks: tuple[int, ...], **group: Any) -> Callable[[], float]:
        def run() -> float:
            dist.barrier()
            begin = time.perf_counter()
            if rank in ranks:
                calibrate(**group)
            dist.barrier()
            return time.perf_counter() - begin

        return run

    both = tuple(range(WORLD))
    return {
        ONE: timed((0,), group=False),
        AGAIN: timed((0,), group=False),
        APART: timed(both, group=False),
        TOGETHER: timed(both),
    }


def on_rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=10),
    )
    model = build(options.model, options.layers, options.width)
    shares = [
        share(each, options.batches, options.length, model.config.vocab_size)
        for each in range(WORLD)
    ]
    times = interleaved(timers(model, rank, shares[rank]), options.repeats)
    together = bs.calibrate(model, shares[rank], progress=False)
    if rank == 0:
        alone = bs.calibrate(model, list(chain(*shares)), progress=False, group=False)
        counts = [[site.count for site in found] for found in (together, alone)]
        Path(folder, "found.json").write_text(json.dumps({"times": times, "counts": counts}))
    dist.barrier()
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every repeat, and the counts of sites, of two processes and of one."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(on_rank, (folder, options), nprocs=WORLD)
        return json.loads(Path(folder, "found.json").read_text())


def report(found: dict[str, Any]) -> Table:
    """The ratios: median and quartiles over repeats."""
    table = Table("", "median", "quartiles", "seconds")
    for name, base in ROWS:
        row = ratios(found["times"], base)[name]
        quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(f"{name} / {base}", f"{row['ratio']:.3f}", quartiles, f"{row['seconds']:.2f}")
    return table


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder or name; default: a random LLaMA")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4, help="of 4 sequences, a process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(given)
    if options.quick:
        options.layers, options.width, options.batches, options.repeats = 2, 64, 2, 2
    return options


def main() -> None:
    options = arguments()
    found = measured(options)
    together, alone = found["counts"]
    if not together or together != alone:
        raise SystemExit(f"counts of two processes {together}, of one {alone}")
    console = Console()
    console.print(report(found))
    console.print(f"counts of two processes equal those of one: {together}")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
