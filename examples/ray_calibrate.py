"""Calibration of data that are in Ray Data: every actor reads its share, and their Sites add up.

    pip install "ray[data]"
    python examples/ray_calibrate.py    # the packaged checkpoint and text, two actors

Run with ray 2.60, on one machine. `streaming_split` hands each actor rows as it asks for them, none
to two, so nothing is held as a whole and nothing counts twice. `Sites` travel between processes
(or as files, `Sites.save` and `Sites.load`), and `a + b` is the calibration on both data sets:
counts are exactly, means up to rounding those of one process, so no `torch.distributed` is needed.
`KeyValues` and `RegisterMeans` add up, too. What `detect` and `perplexity` return does not: for
these let the actors form a process group (`torch.distributed.init_process_group`), and the verb
adds up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import ray
import torch
import typer
from torch import Tensor

import biassurgery as bs
from biassurgery.cli.demo import load_demo_model
from biassurgery.data.packaged import packaged_text, text_batches

LENGTH, ROWS = 32, 8  # tokens a sequence, sequences a batch
MIN_RATIO = 100.0  # the packaged checkpoint is small


@ray.remote(num_cpus=1)
class Calibrator:
    """One model in a process of its own."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = load_demo_model()[0]  # yours: AutoModelForCausalLM.from_pretrained(...)

    def calibrate(self, shard: Any) -> bs.Sites:
        """What is massive in the rows of a `ray.data.DataIterator`."""
        return bs.calibrate(self.model, batches(shard), min_ratio=MIN_RATIO, progress=False)


def batches(shard: Any) -> Iterator[Tensor]:
    """Token ids (B, T) int64, as they arrive."""
    for batch in shard.iter_torch_batches(batch_size=ROWS, prefetch_batches=1):
        yield batch["data"]  # yours: the column of token ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = load_demo_model()
    rows = torch.cat(text_batches(tokenizer, packaged_text("calibration"), LENGTH))

    ray.init(num_cpus=options.actors + 1)  # one for reading
    # yours: ray.data.read_parquet(...) and the like
    data = ray.data.from_numpy([part.numpy() for part in rows.split(ROWS)])
    # equal=True would drop rows where they do not divide
    shards = data.streaming_split(options.actors, equal=False)
    actors = [Calibrator.remote() for _ in shards]
    pairs = zip(actors, shards, strict=True)
    parts = ray.get([actor.calibrate.remote(shard) for actor, shard in pairs])
    sites = reduce(add, parts)
    ray.shutdown()

    typer.echo(str(sites))
    whole = bs.calibrate(model, list(rows.split(ROWS)), min_ratio=MIN_RATIO, progress=False)
    for name, found in (("actors", sites), ("one process", whole)):
        for site in found:
            where = f"layer {site.layer} channel {site.channel} {site.role}"
            value = f"{site.mean:.6f} +- {site.std:.6f}"
            typer.echo(f"{name}: {where}: {site.count} values of {value}")


if __name__ == "__main__":
    main()
