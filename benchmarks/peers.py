"""The same intervention and the same measurement in the libraries that people would use.

    python benchmarks/peers.py MODEL --venvs FOLDER --make   # makes the environments first
    python benchmarks/peers.py MODEL --venvs FOLDER          # some minutes on one CPU core

MODEL is a folder with SmolLM2 (`biassurgery fetch smollm2` prints one). Every library runs in a
process of its own, from its environment in FOLDER, and is compared there with the unpatched model
and with an oracle: plain forwards without a cache and without padding, the value written by hand.

Exit code 1: biassurgery is over its budget, noise included, or a number of its own is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers_ways import WAYS

PACKAGES = {
    "nnsight": "nnsight",
    "pyvene": "pyvene",
    "TransformerLens": "transformer-lens",
    "kvpress": "kvpress",
}
BUDGETS = {"prefill": 1.05, "decode": 1.10}  # of biassurgery
SOURCE = Path(__file__).parents[1] / "src"
HERE = ("by hand", "biassurgery")


def python_of(name: str, venvs: Path) -> Path:
    return Path(sys.executable) if name in HERE else venvs / PACKAGES[name] / "bin" / "python"


def make(name: str, venvs: Path) -> None:
    """An environment with the package, on top of the packages of this one."""
    folder = venvs / PACKAGES[name]
    if folder.exists():
        return
    venv.create(folder, with_pip=True)
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "zz_ours.pth").write_text(str(Path(spec.origin).parents[1]))
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", PACKAGES[name]], check=True
    )


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a library does, in a process of its own; `failed`: why it did not."""
    python = python_of(name, arguments.venvs)
    if not python.exists():
        return {"failed": f"not installed in {arguments.venvs}; --make makes it"}
    done = subprocess.run(
        [
            *(python, Path(__file__).with_name("peers_ways.py"), name, arguments.model),
            *("--repeats", str(arguments.repeats), "--length", str(arguments.length)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(SOURCE),
        },
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def over_budget(result: dict[str, Any]) -> list[str]:
    """What biassurgery promises and does not keep, given the noise of this run."""
    if "failed" in result:
        return [result["failed"]]
    noise = {name: abs(result[name]["again"] - 1) for name in BUDGETS}
    over = [
        f"{name}: {result[name]['ratio']:.3f}x, where {limit:.2f}x + noise {noise[name]:.3f} is"
        " promised"
        for name, limit in BUDGETS.items()
        if result[name]["ratio"] > limit + noise[name]
    ]
    return over + [f"{name} is not right" for name, off in result["off"].items() if off]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Ratios to the unpatched model in the same process, and whether numbers are right."""
    lines = [
        "| | prefill | decode | measure | memory | alone | left padding | decode right |"
        " padded median |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {name} | {result['failed']} |" + " |" * 7)
            continue
        if "off" not in result:
            continue
        times = [f"{result[kind]['ratio']:.2f}x" for kind in ("prefill", "decode", "measure")]
        right = [f"**off: {off}**" if off else "yes" for off in result["off"].values()]
        cells = [name, *times, f"{result['memory'] / 1e6:.0f} MB", *right]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def eviction_table(result: dict[str, Any]) -> str:
    lines = ["| cache | perplexity | seconds |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {cell['perplexity']:.2f} | {cell['seconds']:.1f} |"
        for name, cell in result["eviction"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with SmolLM2")
    parser.add_argument("--venvs", type=Path, required=True, help="a folder of environments")
    parser.add_argument("--make", action="store_true", help="make those that are not there")
    parser.add_argument("--libraries", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prefill")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.libraries:
        if arguments.make and name in PACKAGES:
            make(name, arguments.venvs)
        results[name] = measured(name, arguments)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)  # noqa: T201
    print(table(results))  # noqa: T201
    if "eviction" in results.get("kvpress", {}):
        print(eviction_table(results["kvpress"]))  # noqa: T201
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    over = over_budget(results["biassurgery"]) if "biassurgery" in results else []
    if over:
        raise SystemExit("biassurgery is over its budget: " + "; ".join(over))


if __name__ == "__main__":
    main()
