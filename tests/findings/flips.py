"""Files of each kind, damaged: every bit of their headers flipped, a sample of the bits of their
data, and the file cut or grown. What is loaded then is exactly what was saved, or nothing is.

    python -m tests.findings.flips                every bit
    python -m tests.findings.flips --every 50     a sample of one in fifty

It prints how often each came out. The exit code is 1 if anything else did.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import biassurgery as bs
from biassurgery.errors import FileError
from biassurgery.evaluate.resume import Count, CountFile
from biassurgery.findings.register_neurons import RegisterNeuron
from tests import models
from tests.findings.hand_made import HAND_MADE, calibrated
from tests.refusals import SITES
from tests.state import bits

DATA = 2000  # bits of the data that are flipped
CUTS = 500  # lengths that a file is cut to, besides the first hundred
REFUSED = "FileError"
EXACT = "exact"


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        write: it into a folder; the path of the file that is to be damaged.
        load: all that it says, in a form that can be compared.
        header: from its content to how many bytes are header; all of them, where there is no other
            data.
    """

    write: Callable[[Path], Path]
    load: Callable[[Path], Any]
    header: Callable[[bytes], int] = len


def of_safetensors(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def finding(saved: Any) -> Format:
    def write(folder: Path) -> Path:
        saved.save(folder / "finding.safetensors")
        return folder / "finding.safetensors"

    def load(path: Path) -> Any:
        found = type(saved).load(path)
        return repr(found.header()), {name: bits(t) for name, t in found.tensors().items()}

    return Format(write, load, of_safetensors)


@cache
def model() -> nn.Module:
    return models.planted("llama")


def patch(name: str, header: Callable[[bytes], int], mode: str, **options: Any) -> Format:
    """A file of a saved patch."""

    def state() -> Any:
        return repr(bs.patches(model())), [(n, bits(t)) for n, t in model().state_dict().items()]

    def write(folder: Path) -> Path:
        torch.manual_seed(0)
        with bs.patched(model(), mode, **options):
            bs.save_patch(model(), folder)
        return folder / name

    def load(path: Path) -> Any:
        try:
            bs.load_patch(model(), path.parent)
            return state()
        finally:
            bs.unpatch_model(model())

    return Format(write, load, header)


def papers_means() -> Format:
    def write(folder: Path) -> Path:
        torch.save(dict(enumerate(numbers(2, 2, 8))), folder / "means.pt")
        return folder / "means.pt"

    return Format(write, lambda path: bits(bs.RegisterMeans.load(path).values))


def counts() -> Format:
    def file(path: Path) -> CountFile:
        return CountFile(path, "a" * 32, "top-1", model())

    def write(folder: Path) -> Path:
        file(folder / "counts.json").write(Count(12, 345, 678))
        return folder / "counts.json"

    return Format(write, lambda path: file(path).read())


def checkpoint() -> Format:
    """One of a pass of two batches that was killed behind the first."""
    batches = [models.tokens(rows=1, seed=seed) for seed in (1, 2)]
    name = "calibrate.checkpoint"

    def killed() -> Iterator[torch.Tensor]:
        yield batches[0]
        raise KeyboardInterrupt

    def write(folder: Path) -> Path:
        with suppress(KeyboardInterrupt):
            bs.calibrate(model(), killed(), checkpoint=folder / name)
        return folder / name

    def load(path: Path) -> Any:
        found = bs.calibrate(model(), batches, checkpoint=path)
        return repr(found.header()), {name: bits(t) for name, t in found.tensors().items()}

    return Format(write, load, of_safetensors)


def numbers(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def formats() -> dict[str, Format]:
    """Every kind of file that the library loads, by what it is called in the table."""
    table = numbers(4, 3, 2, 8)
    neurons = (RegisterNeuron(1, 5, 2.5), RegisterNeuron(2, 7, 1.25))
    return {
        "Sites": finding(HAND_MADE),
        "Sites with a tally": finding(calibrated()),
        "KeyValues": finding(bs.KeyValues(*table, 8, "llama")),
        "RegisterMeans": finding(bs.RegisterMeans(table[0], table[1], table[2][:, 0], 8, "vit")),
        "RegisterMeans of the paper (.pt)": papers_means(),
        "RegisterNeurons": finding(bs.RegisterNeurons(neurons, "vit", 3, 8, 2, 10.0, 4, 9)),
        "surgery.safetensors of set_mean": patch(
            "surgery.safetensors", of_safetensors, "set_mean", sites=SITES
        ),
        "surgery.safetensors of a bias": patch(
            "surgery.safetensors", of_safetensors, "attention_bias", kind="kv", std=1.0
        ),
        "surgery.json": patch("surgery.json", len, "set_mean", sites=SITES),
        "checkpoint= of calibrate": checkpoint(),
        "counts of resume= (.json)": counts(),
    }


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damages(content: bytes, header: int, every: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Ways in which a file is damaged, and what it holds then."""
    chance = random.Random(seed)
    for bit in range(chance.randrange(every), 8 * header, every):
        yield "header flipped", flipped(content, bit)
    for _ in range(DATA // every if header < len(content) else 0):
        yield "data flipped", flipped(content, chance.randrange(8 * header, 8 * len(content)))
    lengths = {chance.randrange(len(content)) for _ in range(CUTS)}
    lengths |= {*range(100), header - 1, header, len(content) - 1} & {*range(len(content))}
    for length in sorted(lengths)[:: max(1, every // 8)]:
        yield "cut", content[:length]
    for tail in (b"\0", b"{}", content):
        yield "grown", content + tail


def outcome(load: Callable[[Path], Any], path: Path, expected: Any) -> str:
    """What came of loading: `REFUSED`, `EXACT`, or something that must not be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(path)
    except FileError:
        return REFUSED
    except Exception as error:  # noqa: BLE001 it is what is looked for
        return type(error).__name__
    return EXACT if found == expected else "something else"


def trial(kind: Format, every: int = 1, seed: int = 0) -> dict[str, Counter[str]]:
    """How often each came out, by the way in which the file was damaged."""
    results: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = kind.write(Path(folder))
        content = path.read_bytes()
        expected = kind.load(path)
        for way, damaged in damages(content, kind.header(content), every, seed):
            path.write_bytes(damaged)
            results.setdefault(way, Counter())[outcome(kind.load, path, expected)] += 1
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--every", type=int, default=1, help="take one damage in so many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    table = Table("file", "damage", REFUSED, EXACT, "anything else")
    wrong = 0
    for name, kind in formats().items():
        for way, came_out in trial(kind, asked.every, asked.seed).items():
            other = {what: n for what, n in came_out.items() if what not in (REFUSED, EXACT)}
            wrong += sum(other.values())
            said = ", ".join(f"{what} {n:,}" for what, n in other.items()) or "0"
            table.add_row(name, way, f"{came_out[REFUSED]:,}", f"{came_out[EXACT]:,}", said)
    Console(width=110).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
