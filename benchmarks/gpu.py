"""Is it right on a GPU, and what does it cost there? One command, no network, under eight minutes
on one H100 or H200.

    python benchmarks/gpu.py [--json gpu.json] [--markdown gpu.md] [--seconds 420]
    python benchmarks/gpu.py --device cpu --small   # the same program in under a minute on a CPU

It needs torch, transformers and timm, and a checkout of this repository. Correctness comes first
(`gpu_checks.py`), then what can be compiled beside the most used modes, then ratios at the shape of
LLaMA-7B with random weights (`gpu_ratios.py`), then the rest, then the tests that are marked
`cuda`. What no longer fits into the time is skipped, and says so. The command fails if a row does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import gpu_checks  # noqa: E402
import gpu_ratios  # noqa: E402
import torch  # noqa: E402
from gpu_rows import Row, Skipped, Stage  # noqa: E402

import biassurgery as bs  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """Where it ran."""

    device: str
    small: bool
    torch: str
    biassurgery: str


def rows_of(stages: Iterable[Stage], seconds: float) -> Iterator[Row]:
    """What the stages find, as long as there is time; whatever is raised in one is its row."""
    end = time.monotonic() + seconds
    for stage in stages:
        left = end - time.monotonic()
        if left < stage.seconds:
            reason = f"it may take {stage.seconds:.0f} s, and {max(left, 0):.0f} s are left"
            yield Row(stage.section, stage.name, "skipped", reason)
            continue
        begin = time.monotonic()
        try:
            found = stage.work()
        except Skipped as skipped:
            found = [Row(stage.section, stage.name, "skipped", str(skipped))]
        except Exception as error:  # noqa: BLE001, a row of its own: the rest is still measured
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            found = [Row(stage.section, stage.name, "failed", said)]
        took = time.monotonic() - begin
        for row in found:
            yield row._replace(seconds=took / len(found))


def marked_tests(device: str) -> list[Row]:
    """The tests that are marked `cuda`, in a process of their own."""
    if device == "cpu":
        raise Skipped("needs a GPU")
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/ops", "tests/modes"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    verdict = "passed" if done.returncode == 0 else "failed"
    return [Row("tests", "pytest -m cuda", verdict, last)]


def markdown(rows: list[Row], setting: Setting) -> str:
    """The table for the documentation."""
    lines = [
        f"{setting.device}, torch {setting.torch}, biassurgery {setting.biassurgery}.",
        "",
        "| | | outcome | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.section} | {row.name} | {row.verdict} | {row.said} |" for row in rows]
    return "\n".join(lines) + "\n"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"


def stages_of(device: str, small: bool) -> Iterator[Stage]:
    first, rest = gpu_checks.stages(device, small)
    tests: Callable[[], list[Row]] = lambda: marked_tests(device)  # noqa: E731
    last = [Stage("tests", "pytest -m cuda", 60, tests)]
    return chain(first, gpu_ratios.stages(device, small), last, rest)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, few repeats")
    parser.add_argument("--seconds", type=float, default=420, help="after which nothing is begun")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device here; --device cpu --small tries the rest")
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    rows: list[Row] = []
    for row in rows_of(stages_of(arguments.device, arguments.small), arguments.seconds):
        rows.append(row)
        told = f"{row.verdict:12} {row.section}: {row.name}  {row.said}  ({row.seconds:.1f} s)"
        sys.stdout.write(told + "\n")
        sys.stdout.flush()
    setting = Setting(
        device_name(arguments.device), arguments.small, torch.__version__, bs.__version__
    )
    if arguments.json:
        found = {"setting": asdict(setting), "rows": [row._asdict() for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, setting))
    failed = sum(row.verdict == "failed" for row in rows)
    sys.stdout.write(f"{len(rows)} rows, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
