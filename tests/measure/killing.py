"""Passes over data that are killed with SIGKILL, again and again, and go on from a checkpoint.

Run as `python -m tests.measure.killing FOLDER HOW NAME...`, where HOW is "in turn" or a number of
kills at random times: it writes what it found of each pass to `FOLDER/report.json`. The process
imports and builds everything once; every pass runs in a fork.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.extend import BlockOutput, Statistic
from biassurgery.findings.finding import Finding
from biassurgery.measure import checkpoint
from tests import models, vision
from tests.tiny_vision import CLASSES, pictures, split, tiny

BATCHES = 4
FAULTS = ("forward", "before the rename", "after the rename")


def ids() -> list[torch.Tensor]:
    return [models.tokens(rows=1 + seed % 3, seed=seed) for seed in range(BATCHES)]


def pixels() -> list[torch.Tensor]:
    return [models.images(1 + seed % 3, seed=seed) for seed in range(BATCHES)]


class Pass:
    """One pass: a model, and what is done with it.

    Attributes:
        run: from the batches and the checkpoint (None: none is kept) to the result.
        deadly: the modules at whose first forward the process may die.
    """

    def __init__(
        self, model: Any, data: list[Any], run: Callable[..., Any], deadly: list[Any] | None = None
    ) -> None:
        self.model = model
        self.data = data
        self.deadly = deadly or [find_host(model).blocks[-1]]
        self.run = lambda batches, file: run(model, batches, checkpoint=file)


def patched(mode: str) -> Any:
    model = models.planted("llama")
    return bs.patch_model(model, mode, sites=bs.calibrate(model, ids()))


def labelled() -> Pass:
    model = tiny("timm")
    x = pictures()
    with torch.no_grad():
        said = model(x).argmax(1)
    said[::3] += 1
    pairs = split(x, said % CLASSES)
    return Pass(model, pairs, bs.top1_accuracy)


class Squares(Statistic):
    """A statistic from outside: the mean square of each layer's values."""

    name = "squares"

    def see(self, output: BlockOutput) -> None:
        values = output.hidden[output.real].double()
        self.totals.add(
            output.layer, torch.stack([values.square().sum(), values.new_ones(1).sum()])
        )
        self.totals.add(("rows", output.layer, None), float(values.abs().max()))

    def result(self) -> list[Any]:
        return [
            (key, total.tolist() if isinstance(total, torch.Tensor) else total)
            for key, total in self.totals.items()
        ]


def everything(model: Any, batches: Any, **options: Any) -> Any:
    return bs.detect(model, batches, statistics=("sinks", "squares"), **options)


def by_blocks(verb: Callable[..., Any]) -> Pass:
    """A pass that takes all batches through one block before the next."""

    def run(model: Any, batches: Any, checkpoint: Path | None) -> Any:
        spill = None if checkpoint is None else checkpoint.parent.parent / "states" / verb.__name__
        return verb(model, batches, onload="blocks", checkpoint=checkpoint, spill=spill)

    model = models.planted("llama")
    # One of them is the first to run, whichever block it is that has its turn.
    return Pass(model, ids(), run, [block.mlp for block in find_host(model).blocks])


PASSES: dict[str, Callable[[], Pass]] = {
    "calibrate": lambda: Pass(models.planted("llama"), ids(), bs.calibrate),
    "detect": lambda: Pass(models.planted("llama"), ids(), everything),
    "detect images": lambda: Pass(models.planted_vit(), pixels(), everything),
    "calibrate_key_values": lambda: Pass(models.planted("llama"), ids(), bs.calibrate_key_values),
    "calibrate_registers": lambda: Pass(
        vision.planted("hub_dinov2"), pixels(), bs.calibrate_registers
    ),
    "calibrate by blocks": lambda: by_blocks(bs.calibrate),
    "detect by blocks": lambda: by_blocks(bs.detect),
    "key values by blocks": lambda: by_blocks(bs.calibrate_key_values),
    "perplexity": lambda: Pass(models.planted("llama"), ids(), bs.perplexity),
    "perplexity under noise": lambda: Pass(patched("noise"), ids(), bs.perplexity),
    "top1_accuracy": labelled,
}


def bits(result: Any) -> str:
    """The exact content of a result: every number, and every tensor bit by bit."""
    if isinstance(result, torch.Tensor):
        data = result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{result.dtype}{tuple(result.shape)}{hashlib.sha256(data).hexdigest()}"
    if isinstance(result, Finding):
        return bits((result.header(), result.tensors()))
    if isinstance(result, dict):
        return f"{{{', '.join(f'{name}: {bits(value)}' for name, value in result.items())}}}"
    if isinstance(result, (tuple, list)):
        return f"({', '.join(map(bits, result))})"
    if is_dataclass(result):
        return bits({field.name: getattr(result, field.name) for field in fields(result)})
    return repr(result)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(fault: str, one_pass: Pass) -> None:
    """Let this process die at the first forward, or at the first file that is put in its place."""
    if fault == "forward":
        for module in one_pass.deadly:
            module.register_forward_pre_hook(lambda *_: die())
        return

    def deadly(replace: Callable[..., Any]) -> Callable[..., Any]:
        def replacing(*arguments: Any, **options: Any) -> Any:
            if fault == "before the rename":
                die()
            done = replace(*arguments, **options)
            die()
            return done

        return replacing

    os.replace = deadly(os.replace)
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]  # Python 3.10 keeps its own


class Killer:
    """Starts one pass after another in forks of this process.

    Attributes:
        file: the checkpoint.
        deaths: how many forks were killed.
    """

    def __init__(self, folder: Path, one_pass: Pass) -> None:
        self.folder = folder
        self.file = folder / "pass.checkpoint"
        self.one_pass = one_pass
        self.deaths = 0
        self.starts = 0

    def start(
        self, file: Path | None, fault: str | None = None, seconds: float = math.inf
    ) -> str | None:
        """Run the pass in a fork.

        Args:
            file: the checkpoint; None: none.
            fault: where it kills itself; None: nowhere.
            seconds: after which it is killed from outside.

        Returns:
            The bits of the result; None: it was killed.
        """
        result = self.folder / "result"
        result.unlink(missing_ok=True)
        self.starts += 1
        child = os.fork()
        if not child:
            self._in_the_fork(file, fault, result)
        if seconds < math.inf:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            self.deaths += 1
            return None
        assert os.waitstatus_to_exitcode(status) == 0, result.read_text()
        return result.read_text()

    def _in_the_fork(self, file: Path | None, fault: str | None, result: Path) -> None:
        try:
            # A fresh pass has one seed; one that goes on has another, and must not depend on it.
            fresh = file is None or not file.exists()
            torch.manual_seed(5 if fresh else 1000 + self.starts)
            if fault is not None:
                arm(fault, self.one_pass)
            found = bits(self.one_pass.run(self.data(), file))
            result.write_text(found)
            os._exit(0)
        except Exception as error:  # noqa: BLE001  # the fork must not go on as its parent does
            result.write_text(repr(error))
        finally:
            os._exit(1)

    def data(self) -> Iterator[Any]:
        """The batches, one at a time."""
        yield from self.one_pass.data

    def report(self, whole: str | None, results: Iterable[str | None]) -> dict[str, Any]:
        """What came out, for JSON: `whole` without interruptions, `results` with them."""
        left = sorted(path.name for path in self.folder.iterdir() if path.name != "result")
        return {"whole": whole, "results": list(results), "deaths": self.deaths, "files": left}


def killed_in_turn(killer: Killer) -> dict[str, Any]:
    """A pass that dies at each of its batches at each of the faults, and goes on every time."""
    whole = killer.start(None)
    results = []
    while not results:
        for fault in FAULTS:
            results += [found] if (found := killer.start(killer.file, fault)) else []
    return killer.report(whole, results)


def killed_at_random(killer: Killer, times: int, seed: int) -> dict[str, Any]:
    """A pass that is killed from outside at random times, again and again from the start."""
    chance = random.Random(seed)
    before = time.monotonic()
    whole = killer.start(None)
    longest = time.monotonic() - before
    results: set[str | None] = set()
    while killer.deaths < times:
        if found := killer.start(killer.file, seconds=chance.uniform(0, 1.5 * longest)):
            results.add(found)
            killer.file.unlink()
    results.add(killer.start(killer.file))
    return killer.report(whole, results)


def main(folder: Path, how: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    checkpoint._SECONDS = 0.0
    checkpoint._SHARE = math.inf
    report = {}
    for name in names:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        killer = Killer(place, PASSES[name]())
        if how == "in turn":
            report[name] = killed_in_turn(killer)
        else:
            report[name] = killed_at_random(killer, int(how), seed=3)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
