"""What `pin`, `rescale` and `diagnose` cost, each against the unpatched model in the same run.

    python benchmarks/remedies.py [--quick] [--models llama gpt2] [--repeats N] [--json FILE]

One thread, process time, models of `activations.py`. For pin: how much longer a forward takes than
one of the unpatched model measured again, as a share of the unpatched model, with the 95 % interval
of a bootstrap over repeats. It has passed if the whole interval is within the budget, failed if the
whole of it is beyond; else the run was too noisy to tell. Decoding is as `generate` does it, with a
mask and positions; "alone" is what pin adds to a step of it, run by itself on blocks that do
nothing: far less noisy, but blind to what it does to caches. rescale passes if no module runs other
code than before, and no hook is new: its time is then that of the unpatched model. Of diagnose, the
pass over the data is measured, 3 batches against 1; its five forwards on one sequence are not in
it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from activations import MODELS, build, forward, forwards, hand_made, tokens
from timing import Difference, difference, interleaved, one_thread, seconds
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import edits_in
from biassurgery.surgery.starts import StartEdit

BUDGETS = {"prefill": 0.01, "decode": 0.02}
PASS = 1.3  # diagnose's pass over the data, in forwards
PROMPT, STEPS = 64, 16
LENGTH, FULL = 64, 41  # tokens of a prefill, repeats


def start_sites() -> bs.Sites:
    return bs.Sites([site for site in hand_made() if site.role == "start"])


def variants(model: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {
        "unpatched": partial(nullcontext, model),
        "unpatched again": partial(nullcontext, model),
        "pin": lambda: bs.patched(model, "pin", sites=start_sites()),
        "pin, all layers": lambda: bs.patched(model, "pin", sites=start_sites(), layers="all"),
    }


def decode(model: Any, step: Tensor, steps: int, cache: Any) -> None:
    """One token at a time behind a cache, as `generate` asks for it."""
    for at in range(PROMPT, PROMPT + steps):
        mask = torch.ones(1, at + 1, dtype=torch.int64)
        positions = torch.tensor([[at]])
        model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


def pinned(model: Any, length: int, repeats: int) -> dict[str, dict[str, Difference]]:
    """By row, then way of running: how much longer it takes than the unpatched model again."""
    ids = tokens(model, 1, length)
    prompt = tokens(model, 1, PROMPT)
    cache = model(prompt, use_cache=True).past_key_values

    def prefill(variant: Callable[[], AbstractContextManager[Any]]) -> float:
        with variant() as m:
            return seconds(lambda: forward(m, ids), "cpu")

    def decoding(variant: Callable[[], AbstractContextManager[Any]]) -> float:
        with variant() as m:
            fresh = copy.deepcopy(cache)
            return seconds(lambda: decode(m, prompt[:, 1:2], STEPS, fresh), "cpu")

    found: dict[str, dict[str, Difference]] = {}
    for way, timer in (("prefill", prefill), ("decode", decoding)):
        ready = {name: partial(timer, variant) for name, variant in variants(model).items()}
        times = interleaved(ready, repeats)
        rows = {name: "unpatched again" for name in ready if name.startswith("pin")}
        for name, other in {**rows, "unpatched again": "unpatched"}.items():
            found.setdefault(name, {})[way] = difference(times, name, other, "unpatched")
    return found


class Nothing(nn.Module):
    """A block that costs nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def alone(model: Any, layers: str, rounds: int) -> dict[str, float]:
    """What pin adds to one step of decoding, run by itself on blocks that do nothing.

    Returns:
        `microseconds`, and `share` of a step of the unpatched model.
    """
    prompt = tokens(model, 1, PROMPT)
    cache = model(prompt, use_cache=True).past_key_values
    step = prompt[:, 1:2]
    given = {
        "input_ids": step,
        "attention_mask": torch.ones(1, PROMPT + 1, dtype=torch.int64),
        "position_ids": torch.tensor([[PROMPT]]),
        "past_key_values": cache,
    }
    hidden = torch.zeros(1, 1, model.config.hidden_size)
    with bs.patched(model, "pin", sites=start_sites(), layers=layers):
        edits = [edit for _, edit in edits_in(model)]
        (starts,) = (edit for edit in edits if isinstance(edit, StartEdit))
        plain = [Nothing() for edit in edits if isinstance(edit, BlockEdit)]
        pinned = [Nothing() for _ in plain]
        for block, edit in zip(pinned, (each for each in edits if isinstance(each, BlockEdit))):
            edit.attach(block)

        def run(blocks: list[Nothing], sees: bool) -> None:
            for _ in range(rounds):
                if sees:
                    starts.see(given)
                for block in blocks:
                    block(hidden)

        runs = {"with": partial(run, pinned, True), "without": partial(run, plain, False)}
        times = interleaved({name: partial(seconds, r, "cpu") for name, r in runs.items()}, 7)
    added = [one - other for one, other in zip(times["with"], times["without"])]
    seen = {"step": partial(seconds, lambda: decode(model, step, 4, copy.deepcopy(cache)), "cpu")}
    one_step = statistics.median(interleaved(seen, 5)["step"]) / 4
    each = statistics.median(added) / rounds
    return {"microseconds": 1e6 * each, "share": each / one_step}


def code_of(model: nn.Module) -> dict[str, Any]:
    """What runs in a forward, by module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        name: (type(module).forward, *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    }


def rescaled(model: Any) -> bool:
    """Whether the rescaled model runs what the model runs, and nothing else."""
    before = code_of(model)
    with bs.patched(model, "rescale", factor=0.25):
        after = code_of(model)
    return all(after[name] == code for name, code in before.items())


def diagnosing(model: Any, length: int, repeats: int) -> Difference:
    """How many forwards a pass over the data takes, and its interval."""
    batches = [tokens(model, 1, length, seed=seed) for seed in range(3)]
    runs = {
        "forward": lambda: forwards(model, batches[1:]),
        "three": lambda: bs.diagnose(model, batches, progress=False),
        "one": lambda: bs.diagnose(model, batches[:1], progress=False),
    }
    timers = {name: partial(seconds, run, "cpu") for name, run in runs.items()}
    return difference(interleaved(timers, repeats), "three", "one", "forward")


def measured(name: str, length: int, repeats: int) -> dict[str, Any]:
    model = build(name, "cpu", torch.float32)
    rows: dict[str, Any] = {
        row: {
            way: {**found._asdict(), "verdict": found.verdict(BUDGETS[way])}
            for way, found in ways.items()
        }
        for row, ways in pinned(model, length, repeats).items()
    }
    for numbers in rows["unpatched again"].values():
        numbers["verdict"] = "the noise"
    for row, layers in {"pin": "first", "pin, all layers": "all"}.items():
        rows[row]["decode, alone"] = alone(model, layers, 200)
    found = diagnosing(model, length, max(3, repeats // 5))
    rows["diagnose"] = {"pass": {**found._asdict(), "verdict": found.verdict(PASS)}}
    rows["rescale"] = {"code": "passed" if rescaled(model) else "failed"}
    return rows


def table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("", *(MODELS[name] for name in results), "budget")
    for row, ways in next(iter(results.values())).items():
        for way in ways:
            cells = [cell(result[row][way]) for result in results.values()]
            budgets = {"pass": f"{PASS:.2f}x", "code": "1.00x", "decode, alone": ""}
            budget = budgets[way] if way in budgets else f"{BUDGETS[way]:+.2f}x"
            shown.add_row(f"{row}: {way}", *cells, budget)
    return shown


def cell(found: Any) -> str:
    if isinstance(found, str):
        return f"1.00x, no code in the forward: {found}"
    if "share" in found:
        return "{share:+.4f}x, {microseconds:.0f} us".format(**found)
    numbers = "{median:+.4f}x ({low:+.4f} to {high:+.4f})".format(**found)
    return f"{numbers}: {found['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama", "gpt2"])
    parser.add_argument("--repeats", type=int, default=FULL)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else arguments.repeats
    length = 16 if arguments.quick else LENGTH
    with one_thread(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = {name: measured(name, length, repeats) for name in arguments.models}
    from rich.console import Console

    Console(width=150).print(table(results))
    if arguments.json:
        setting = {"repeats": repeats, "length": length, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
