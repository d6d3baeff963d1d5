"""Time and memory of `calibrate(onload="blocks")` on a checkpoint larger than a memory limit.

    python benchmarks/onload.py FOLDER            # blocks of the shape of LLaMA-70B's, 10 GB
    python benchmarks/onload.py FOLDER --quick    # small blocks, 0.3 GB, half a minute
    python benchmarks/onload.py FOLDER --readings # how often each verb reads a weight, small blocks

A checkpoint of random weights is written to FOLDER, one file a block, and removed at the end. A
process of its own loads what is around the blocks, and may then allocate no more than two blocks,
the hidden states of all batches and a few megabytes (RLIMIT_DATA), while it calibrates; its memory
is sampled from the start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

MB = 1e6
SPARE = 20e9  # bytes of the disk that are left free
WORK = 32e6  # bytes for all that is neither a block nor waits between two


class Shape(NamedTuple):
    """Of a LLaMA."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """The weights of one block."""
        kv = self.width // self.heads * self.kv_heads
        return {
            "self_attn.q_proj.weight": (self.width, self.width),
            "self_attn.k_proj.weight": (kv, self.width),
            "self_attn.v_proj.weight": (kv, self.width),
            "self_attn.o_proj.weight": (self.width, self.width),
            "mlp.gate_proj.weight": (self.inner, self.width),
            "mlp.up_proj.weight": (self.inner, self.width),
            "mlp.down_proj.weight": (self.width, self.inner),
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
        }

    @property
    def block_bytes(self) -> int:
        return sum(torch.Size(size).numel() for size in self.block.values()) * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        return self.vocabulary * self.width * self.dtype.itemsize


LLAMA_70B = Shape(8192, 28672, 64, 8, 32_000, torch.bfloat16)
SMALL = Shape(512, 1408, 8, 2, 1_000, torch.float32)
BLOCKS_70B = 80
VOCABULARY_70B = 128_256


def write(folder: Path, shape: Shape, blocks: int) -> int:
    """Write a checkpoint of random weights, one file a block; how many bytes it has."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=str(shape.dtype).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    table = (shape.vocabulary, shape.width)
    files = {
        "ends": {
            "model.embed_tokens.weight": table,
            "model.norm.weight": (shape.width,),
            "lm_head.weight": table,
        }
    }
    for layer in range(blocks):
        files[f"block-{layer}"] = {
            f"model.layers.{layer}.{name}": size for name, size in shape.block.items()
        }
    index = {}
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, sizes in files.items():
        file = f"{name}.safetensors"
        # All blocks get the same random numbers, which are slow to draw; to read, they are others.
        for key, size in sizes.items():
            if _in_block(key) not in drawn:
                drawn[_in_block(key)] = _random(size, shape.dtype, generator)
        weights = {key: drawn[_in_block(key)] for key in sizes}
        save_file(weights, folder / file, {"format": "pt"})
        index |= dict.fromkeys(sizes, file)
    total = blocks * shape.block_bytes + 2 * shape.table_bytes
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return total


def _in_block(name: str) -> str:
    """The name of a weight without the number of its block."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def _random(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(std=0.02, generator=generator)


def batches_of(windows: int, length: int, vocabulary: int) -> list[Tensor]:
    """So many batches of one window (1, length)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (windows, length), generator=generator)
    return list(ids.split(1))


def status(*names: str) -> float:
    """Bytes of this process, by their names in /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * sum(int(lines[name].split()[0]) for name in names)


@contextmanager
def sampled(names: tuple[str, ...]) -> Iterator[dict[str, float]]:
    """The largest of each number within the block, sampled every few milliseconds."""
    peak = {name: status(name) for name in names}
    peak["together"] = status(*names)
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.003):
            now = {name: status(name) for name in names}
            now["together"] = sum(now.values())
            for name, value in now.items():
                peak[name] = max(peak[name], value)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def forget_pages(folder: Path) -> None:
    """Let the system drop what it has cached of the files, so that they are read from disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def inside(folder: Path, windows: int, length: int, allowance: float, way: str) -> dict[str, Any]:
    """Load a checkpoint, and calibrate with a limit of `allowance` bytes more than there are then.

    Args:
        folder: with the checkpoint.
        windows, length: of the data.
        allowance: in bytes.
        way: `blocks`, or `whole` for the ordinary way.
    """
    import biassurgery as bs
    from biassurgery.data.loading import load_model

    torch.set_num_threads(1)
    batches = batches_of(windows, length, 1000)
    options: Any = {"onload": "blocks"} if way == "blocks" else {}
    warm_up(bs)
    forget_pages(folder)
    anonymous, before = status("RssAnon"), status("RssAnon", "RssFile")
    with sampled(("RssAnon", "RssFile")) as peak:
        # transformers maps all files while it loads, which the system counts as data of the
        # process though nothing of them is in memory; so the limit comes behind that.
        if way == "whole":
            limit(allowance)
        model = load_model(str(folder), device="cpu", **options).model
        if way == "blocks":
            limit(allowance)
        begin = time.perf_counter()
        # Low thresholds, so that random weights have something that counts as massive.
        sites = bs.calibrate(
            model, batches, min_magnitude=0.0, min_ratio=8.0, progress=False, **options
        )
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "anonymous": peak["RssAnon"] - anonymous,
        "resident": peak["together"] - before,
        "sites": [[s.layer, s.channel, s.role, s.mean, s.std, s.count] for s in sites],
    }


def readings(folder: Path, windows: int, length: int) -> dict[str, dict[str, float]]:
    """How often each verb reads the weights that are on disk: bytes that are read over their bytes.

    Block by block and in the ordinary way, on a model whose blocks and head stay on disk.
    """
    from accelerate.utils.offload import OffloadedWeightsLoader

    import biassurgery as bs
    from biassurgery.data.loading import load_model

    model = load_model(str(folder), device="cpu", onload="blocks").model
    there = sum(weight.nbytes for weight in model.parameters() if weight.is_meta)
    batches = batches_of(windows, length, 1000)
    massive: Any = {"min_magnitude": 0.0, "min_ratio": 8.0}
    nothing: Any = {"min_magnitude": 1e9}
    runs: dict[str, Any] = {
        "calibrate, nothing massive": partial(bs.calibrate, **nothing),
        "calibrate": partial(bs.calibrate, **massive),
        "detect, nothing massive": partial(bs.detect, **nothing),
        "detect": partial(bs.detect, **massive),
        "calibrate_key_values": bs.calibrate_key_values,
        "diagnose": partial(bs.diagnose, **massive),
    }
    read: list[int] = []
    load = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, name: str) -> Tensor:
        weight = load(self, name)
        read.append(weight.nbytes)
        return weight

    OffloadedWeightsLoader.__getitem__ = counting
    try:
        found: dict[str, dict[str, float]] = {}
        for name, run in runs.items():
            found[name] = {}
            for onload in ("blocks", None):
                read.clear()
                run(model, batches, onload=onload, progress=False)
                found[name][onload or "ordinarily"] = sum(read) / there
        return found
    finally:
        OffloadedWeightsLoader.__getitem__ = load


def report_readings(windows: int, found: dict[str, dict[str, float]]) -> None:
    """Print them as a table."""
    print(f"| readings of each weight | block by block | ordinarily, {windows} batches |")  # noqa: T201
    print("| --- | ---: | ---: |")  # noqa: T201
    for name, of in found.items():
        print(f"| {name} | {of['blocks']:.2f} | {of['ordinarily']:.2f} |")  # noqa: T201


def limit(allowance: float) -> None:
    """Let this process allocate so many bytes more than it has."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = int(status("VmData") + allowance)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def warm_up(bs: Any) -> None:
    """What a process needs once, whatever the model: libraries, and memory of their own."""
    from accelerate import cpu_offload
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    cpu_offload(tiny)
    ids = torch.arange(8)[None]
    bs.calibrate(tiny, ids, min_magnitude=0.0, min_ratio=3.0, progress=False, onload="blocks")


def measured(
    folder: Path, windows: int, length: int, allowance: float, way: str
) -> subprocess.CompletedProcess[str]:
    """`inside` in a process of its own; the last line of its output is the result."""
    command = [sys.executable, __file__, str(folder), "--windows", str(windows)]
    command += ["--length", str(length), "--inside", way, "--allowance", str(int(allowance))]
    # So that what is freed goes back to the system at once, as blocks of a real size do.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    environment = os.environ | malloc | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def allowance_of(shape: Shape, windows: int, length: int) -> float:
    """Two blocks, and the hidden states of all windows."""
    return 2 * shape.block_bytes + windows * length * shape.width * shape.dtype.itemsize


def report(shape: Shape, blocks: int, total: int, windows: int, length: int, found: Any) -> None:
    """Print the table, and what follows for a model of 80 blocks."""
    tokens = windows * length
    allowed = allowance_of(shape, windows, length)
    passes = 2 if found["sites"] else 1
    each = found["seconds"] / (blocks * passes)
    rows = {
        "checkpoint": f"{total / MB:,.0f} MB, {blocks} blocks of {shape.block_bytes / MB:,.0f} MB",
        "allowed behind the embeddings: two blocks and the states": f"{allowed / MB:,.0f} MB",
        "peak of anonymous memory": f"{found['anonymous'] / MB:,.0f} MB",
        "peak with the mapped weights": f"{found['resident'] / MB:,.0f} MB",
        "read": f"{passes} times: the pass, and the run that confirms the sites found in it"
        if passes == 2
        else "once",
        "data": f"{windows} windows of {length} tokens",
        "time": f"{found['seconds']:,.0f} s, {each:.2f} s a block and reading",
    }
    for name, value in rows.items():
        print(f"| {name} | {value} |")  # noqa: T201
    if shape is LLAMA_70B:
        states = tokens * shape.width * shape.dtype.itemsize
        table = VOCABULARY_70B * shape.width * shape.dtype.itemsize
        peak = 2 * shape.block_bytes + table + states
        print(  # noqa: T201
            f"\nLLaMA-70B has {BLOCKS_70B} such blocks ({BLOCKS_70B * shape.block_bytes / MB:,.0f}"
            f" MB): {BLOCKS_70B * each / 60:,.0f} minutes for one reading of these {tokens} tokens,"
            f" and at most {peak / MB:,.0f} MB with its embeddings."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--readings", action="store_true")
    parser.add_argument("--inside", choices=("blocks", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--allowance", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        found = inside(given.folder, given.windows, given.length, given.allowance, given.inside)
        print(json.dumps(found))  # noqa: T201
        return
    small = given.quick or given.readings
    shape = SMALL if small else LLAMA_70B
    blocks = given.blocks or (24 if given.quick else 5)
    needed = blocks * shape.block_bytes + 2 * shape.table_bytes
    place = given.folder.resolve().parent
    disk = os.statvfs(place)
    if disk.f_bavail * disk.f_frsize < needed + (0 if small else SPARE):
        raise SystemExit(f"{place} has no room for {needed / MB:,.0f} MB and {SPARE / MB:,.0f} MB")
    try:
        total = write(given.folder, shape, blocks)
        if given.readings:
            torch.set_num_threads(1)
            found = readings(given.folder, given.windows, given.length)
            report_readings(given.windows, found)
            return
        allowance = WORK + allowance_of(shape, given.windows, given.length)
        done = measured(given.folder, given.windows, given.length, allowance, "blocks")
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        report(shape, blocks, total, given.windows, given.length, found)
    finally:
        for file in (*given.folder.glob("*.safetensors"), *given.folder.glob("*.json")):
            file.unlink()
        given.folder.rmdir()


if __name__ == "__main__":
    main()
