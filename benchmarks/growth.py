"""How the cost of `calibrate`, `record` and `set_mean` grows: a straight line for each.

    python benchmarks/growth.py           # small, about a minute on an idle core
    python benchmarks/growth.py --full    # up to 8,192 tokens, 64 blocks, 10,000 batches
    python benchmarks/growth.py --full --varied batches processes

Random LLaMAs whose start token carries a massive activation. The unpatched forward is measured in
the same rounds; the line is by least squares of relative distances through the shortest time
of each size, and "off" the largest distance of a point from it, as a share of that point. Memory is
what is held beyond the model and the batches at the peak, by the highest resident size of the
process (Linux), in a run of its own: what torch caches and fragments is in it.

Processes read as many batches each, over gloo, and are timed by the clock from when all are ready
until all are done: `forward` and `calibrate, apart` exchange nothing, and say what the machine
makes of so many processes; with a core for each, all rows are level.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from timing import interleaved, one_thread, seconds
from torch import Tensor

import biassurgery as bs

CHANNEL, LEVEL = 5, 3000.0
LAYER = 0
MB = 1e6
PATCH = bs.Sites([bs.Site(LAYER, CHANNEL, "start", LEVEL, gate=300.0)])


class Sizes(NamedTuple):
    """What is varied, one at a time, and where the others stay."""

    width: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    batches: tuple[int, ...]
    processes: tuple[int, ...]
    stays: dict[str, int]
    repeats: int


SMALL = Sizes(
    64,
    (128, 256, 512, 1024),
    (2, 4, 8, 16),
    (10, 20, 40, 80),
    (1, 2),
    dict(tokens=64, blocks=4, batches=4),
    3,
)
FULL = Sizes(
    256,
    (512, 1024, 2048, 4096, 8192),
    (4, 8, 16, 32, 64),
    (10, 100, 1000, 10_000),
    (1, 2),
    dict(tokens=128, blocks=4, batches=4),
    3,
)
QUICK = Sizes(
    16, (16, 32, 64), (1, 2, 3), (1, 2, 4), (1, 2), dict(tokens=16, blocks=2, batches=1), 1
)
VARIED = ("tokens", "blocks", "batches", "processes")
CLEAR_PEAK = Path("/proc/self/clear_refs")


def build(width: int, blocks: int) -> Any:
    """A random LLaMA whose token 0 enters with a massive activation and carries it on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=4 * width,
        vocab_size=1000,
        max_position_embeddings=max(FULL.tokens),
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, CHANNEL] = LEVEL
    return model


def texts(batches: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """Batches of one sequence behind the start token."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 1000, (batches, 1, tokens), generator=drawn)
    ids[..., 0] = 0
    return list(ids)


# What is measured


@torch.no_grad()
def forward(model: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch, use_cache=False)


def calibrate(model: Any, batches: list[Tensor]) -> None:
    assert len(bs.calibrate(model, batches, progress=False))


def record(model: Any, batches: list[Tensor]) -> None:
    with bs.record(model, "sink_mass"):
        forward(model, batches)


def set_mean(model: Any, batches: list[Tensor]) -> None:
    with bs.patched(model, "set_mean", sites=PATCH):
        forward(model, batches)


WAYS: dict[str, Callable[[Any, list[Tensor]], None]] = {
    "forward": forward,
    "calibrate": calibrate,
    "record": record,
    "set_mean": set_mean,
}


def resident(what: str) -> float:
    """Megabytes of this process: `VmRSS`, now, or `VmHWM`, at most since that was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / MB


def peak(run: Callable[[], None]) -> float:
    """Megabytes that are held at most beyond those of before."""
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_PEAK.write_text("5")
    before = resident("VmRSS")
    run()
    return max(0.0, resident("VmHWM") - before)


def measure(sizes: Sizes, varied: str, value: int) -> dict[str, dict[str, float]]:
    """Seconds and megabytes of each way at one size."""
    at = {**sizes.stays, varied: value}
    model = build(sizes.width, at["blocks"])
    batches = texts(at["batches"], at["tokens"])
    runs = {name: partial(way, model, batches) for name, way in WAYS.items()}
    times = interleaved({n: partial(seconds, run, "cpu") for n, run in runs.items()}, sizes.repeats)
    return {
        name: {"seconds": min(times[name])} | ({"MB": peak(run)} if CLEAR_PEAK.exists() else {})
        for name, run in runs.items()
    }


def on_rank(rank: int, sizes: Sizes, world: int, folder: str) -> None:
    """One of several processes, each with as many batches; the first writes down the seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=30),
    )
    at = sizes.stays
    model = build(sizes.width, at["blocks"])
    batches = texts(at["batches"], at["tokens"], seed=rank)

    def timed(run: Callable[[], object]) -> float:
        dist.barrier()
        begin = time.perf_counter()
        run()
        dist.barrier()
        return time.perf_counter() - begin

    runs = {
        "forward": partial(forward, model, batches),
        "calibrate, apart": partial(bs.calibrate, model, batches, progress=False, group=False),
        "calibrate": partial(bs.calibrate, model, batches, progress=False),
    }
    times = interleaved({name: partial(timed, run) for name, run in runs.items()}, sizes.repeats)
    if rank == 0:
        found = {name: {"seconds": min(of)} for name, of in times.items()}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_processes(sizes: Sizes, world: int) -> dict[str, dict[str, float]]:
    """Seconds of each way on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(on_rank, (sizes, world, folder), nprocs=world)
        return json.loads(Path(folder, "found.json").read_text())


class Line(NamedTuple):
    """Its slope, and how far a point is from it at most, as a share of that point."""

    slope: float
    off: float


def line(sizes: tuple[int, ...], values: list[float]) -> Line:
    """The straight line through a value for each size.

    The squares are of relative distances: a line must hold at small sizes, too.
    """
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    weights = 1 / y.clamp(min=1e-9)
    matrix = torch.stack([x, torch.ones_like(x)], 1) * weights[:, None]
    slope, offset = torch.linalg.lstsq(matrix, torch.ones_like(x)[:, None]).solution[:, 0]
    return Line(slope.item(), ((slope * x + offset - y).abs() * weights).max().item())


def show(varied: str, sizes: tuple[int, ...], found: list[dict[str, dict[str, float]]]) -> None:
    """A row a way: milliseconds at each size, their line, megabytes at the ends."""
    table = Table("", *(f"{size:,}" for size in sizes), "slope", "off", "/ forward", "MB")
    table.title = f"{varied}: milliseconds, and microseconds for each one more"
    for name in found[0]:
        times = [at[name]["seconds"] for at in found]
        fit = line(sizes, times)
        memory = [f"{at[name]['MB']:.0f}" for at in (found[0], found[-1]) if "MB" in at[name]]
        table.add_row(
            name,
            *(f"{1e3 * value:.1f}" for value in times),
            f"{1e6 * fit.slope:,.1f}",
            f"{100 * fit.off:.0f} %",
            f"{times[-1] / found[-1]['forward']['seconds']:.2f}",
            " to ".join(memory),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true")
    which.add_argument("--quick", action="store_true", help="does it run at all?")
    parser.add_argument("--varied", nargs="+", choices=VARIED, default=VARIED)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = FULL if options.full else QUICK if options.quick else SMALL
    results = {}
    with one_thread():
        for varied in options.varied:
            values = getattr(sizes, varied)
            if varied == "processes":
                found = [measure_processes(sizes, value) for value in values]
            else:
                found = [measure(sizes, varied, value) for value in values]
            show(varied, values, found)
            results[varied] = dict(zip(map(str, values), found, strict=True))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
