"""Speed and memory of fixing and calibrating massive activations, each as a ratio to the unpatched
model in the same run.

    python benchmarks/activations.py [--quick] [--json FILE] [--device cuda --dtype bfloat16]
    [--compile]

One thread. Every repeat runs all variants in turn, and a ratio is the median over repeats of
(variant / unpatched of that repeat); the row "unpatched again" is the noise. Models are random, of
the size of GPT-2 small and of LLaMA-160M, with a start token that carries two massive activations.
The official way is that of Sun et al.'s code: clone every block's output to the CPU in float64,
then take magnitudes, sort and median per layer. Memory is what a process of its own needs at its
peak beyond the loaded model.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, one_thread, ratios, seconds, verdict
from torch import Tensor, nn

import biassurgery as bs

MODELS = {"gpt2": "GPT-2 small", "llama": "LLaMA-160M"}
# massive activations appear at block 2 of 12 and vanish after block 10
LAYER = 2
LAST = 10
LEVELS = {
    447: {"start": 3000.0, "elsewhere": 9000.0},
    138: {"start": -1500.0, "elsewhere": -4000.0},
}
TARGETS = {
    "prefill": 1.01,
    "prefill, all layers": 1.01,
    "decode": 1.02,
    "decode, all layers": 1.02,
    "calibrate": 1.10,
    "calibrate_key_values": 1.05,
}


@dataclass(frozen=True)
class Sizes:
    """How much is run: tokens (rows, length), decoding steps behind the prompt, calibration
    batches, repeats.
    """

    prefill: tuple[int, int]
    prompt: tuple[int, int]
    steps: int
    batch: tuple[int, int]
    batches: int
    repeats: int


CPU = Sizes(prefill=(1, 512), prompt=(1, 64), steps=16, batch=(4, 256), batches=2, repeats=21)
CUDA = Sizes(prefill=(8, 1024), prompt=(1, 64), steps=64, batch=(8, 1024), batches=4, repeats=51)
QUICK = Sizes(prefill=(1, 64), prompt=(1, 8), steps=4, batch=(1, 64), batches=1, repeats=3)


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """A random causal LM whose token 0 enters with the `start` levels and carries them to the last
    block.
    """
    import transformers as tf

    torch.manual_seed(0)
    if name == "gpt2":
        config: Any = tf.GPT2Config()
    else:
        config = tf.LlamaConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            vocab_size=32000,
        )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for channel, level in LEVELS.items():
            model.get_input_embeddings().weight[0, channel] = level["start"]
    return model.to(device, dtype)


def tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) int64 random ids behind the start token."""
    ids = torch.randint(1, 32000, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids.to(next(model.parameters()).device)


def hand_made() -> bs.Sites:
    """Two channels with a level each at the start and elsewhere, as LLaMA-2-7B has, at every block
    that carries them.
    """
    return bs.Sites(
        bs.Site(layer, channel, role, mean)
        for layer in range(LAYER, LAST + 1)
        for channel, levels in LEVELS.items()
        for role, mean in levels.items()
    )


# What is measured


def forward(model: Any, ids: Tensor) -> None:
    model(ids, use_cache=False)


def decode(model: Any, step: Tensor, steps: int, cache: Any) -> None:
    """One token at a time behind a cache that exists already."""
    for _ in range(steps):
        model(step, past_key_values=cache, use_cache=True)


def forwards(model: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        forward(model, batch)


def bodies(model: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        model.base_model(batch, use_cache=False)


def calibrate(model: Any, batches: list[Tensor]) -> None:
    bs.calibrate(model, batches, progress=False)


def calibrate_key_values(model: Any, batches: list[Tensor]) -> None:
    bs.calibrate_key_values(model, batches, progress=False)


def official(model: Any, batches: list[Tensor]) -> None:
    """Top three and median magnitude of every block, as the code of Sun et al. takes them."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    kept: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        kept[layer] = (
            (output if isinstance(output, Tensor) else output[0]).clone().detach().cpu().double()
        )

    hooks = [
        block.register_forward_hook(partial(keep, layer)) for layer, block in enumerate(blocks)
    ]
    for batch in batches:
        forward(model, batch)
        for layer in range(len(blocks)):
            magnitude = kept[layer].abs()
            torch.sort(magnitude.flatten(), descending=True).values[:3].tolist()
            magnitude.median().item()
    for hook in hooks:
        hook.remove()


# How it is measured

Variant = Callable[[], AbstractContextManager[Any]]


def variants(model: Any, compiled: bool) -> dict[str, Variant]:
    """The unpatched model, itself again, and with `set_mean` at the first layer and at all.

    Eager variants share one model object, so that its place in memory is no difference; compiled
    ones are copies, since each patch would compile anew.
    """
    patches: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
        "unpatched": nullcontext,
        "unpatched again": nullcontext,
        "first": lambda m: bs.patched(m, "set_mean", sites=hand_made()),
        "all": lambda m: bs.patched(m, "set_mean", sites=hand_made(), layers="all"),
    }
    if not compiled:
        return {name: partial(patch, model) for name, patch in patches.items()}
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = (
        64  # the copies share one code object; the default would fall back to eager unseen
    )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ready: dict[str, Variant] = {}
    for name, patch in patches.items():
        twin = copy.deepcopy(model)
        patch(twin).__enter__()  # never left: the copy stays patched
        ready[name] = partial(nullcontext, torch.compile(twin))
    return ready


def timed(model: Any, sizes: Sizes, device: str, compiled: bool) -> dict[str, dict[str, float]]:
    """All timings of one model."""
    ready = variants(model, compiled)
    ids = tokens(model, *sizes.prefill)
    prompt = tokens(model, *sizes.prompt)
    cache = model(prompt, use_cache=True).past_key_values
    batches = [tokens(model, *sizes.batch, seed=seed) for seed in range(sizes.batches)]

    def prefill(variant: Variant) -> float:
        with variant() as m:
            return seconds(lambda: forward(m, ids), device)

    def decoding(variant: Variant) -> float:
        with variant() as m:
            fresh = copy.deepcopy(cache)
            return seconds(lambda: decode(m, prompt[:, 1:2], sizes.steps, fresh), device)

    found: dict[str, dict[str, float]] = {}
    for label, timer in (("prefill", prefill), ("decode", decoding)):
        times = interleaved(
            {name: partial(timer, variant) for name, variant in ready.items()}, sizes.repeats
        )
        part = ratios(times, "unpatched")
        found |= {
            label: part["first"],
            f"{label}, all layers": part["all"],
            f"{label}, unpatched again": part["unpatched again"],
        }
    whole = {
        "forward": forwards,
        "forward without head": bodies,
        "calibrate": calibrate,
        "calibrate_key_values": calibrate_key_values,
        "official way": official,
    }
    passes = {
        name: partial(seconds, partial(run, model, batches), device) for name, run in whole.items()
    }
    times = interleaved(
        passes, max(3, sizes.repeats // 3)
    )  # these are long, and their differences large
    found |= {name: value for name, value in ratios(times, "forward").items() if name != "forward"}
    return found


PEAKS = {
    "forward": forwards,
    "set_mean": forwards,
    "calibrate": calibrate,
    "official way": official,
}


def peak_here(what: str, model: Any, sizes: Sizes, device: str) -> int:
    """Bytes at the peak beyond the loaded model, of this process."""
    batches = [tokens(model, *sizes.batch, seed=seed) for seed in range(sizes.batches)]
    if what == "set_mean":
        bs.patch_model(model, "set_mean", sites=hand_made(), layers="all")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PEAKS[what](model, batches)
        return torch.cuda.max_memory_allocated() - before
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text(
            "5"
            # Linux: the peak starts again at what is resident now, not at what building the model
            # took
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    PEAKS[what](model, batches)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )


def peak(what: str, name: str, arguments: argparse.Namespace) -> int:
    """The same, measured in a process of its own; call it while this one is small, for on Linux a
    child inherits the peak.
    """
    command = [
        sys.executable,
        __file__,
        "--device",
        arguments.device,
        "--dtype",
        arguments.dtype,
        "--peak",
        what,
        name,
    ]
    command += ["--quick"] if arguments.quick else []
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


# Output


def cell_of(times: dict[str, dict[str, float]], row: str, again: str) -> str:
    """A ratio, and whether it keeps its target where there is a row of the noise beside it."""
    said = f"{times[row]['ratio']:.3f}x"
    if row in TARGETS and again in times:
        said += f"  {verdict(times[row], times[again], TARGETS[row] - 1)}"
    return said


def table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table(
        "", *(MODELS[name] for name in results), "target", title="relative to the unpatched model"
    )
    first = next(iter(results.values()))
    for row in first["time"]:
        target = f"{TARGETS[row]:.2f}x" if row in TARGETS else ""
        again = f"{row.split(',')[0]}, unpatched again"
        label = f"set_mean: {row}" if row in TARGETS and not row.startswith("calibrate") else row
        shown.add_row(
            label,
            *(cell_of(result["time"], row, again) for result in results.values()),
            target,
        )
    shown.add_section()
    for row in first["peak"]:
        shown.add_row(
            f"peak: {row}",
            *(f"{result['peak'][row] / 1e6:,.0f} MB" for result in results.values()),
            "",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny inputs and three repeats: does it run at all?"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="patched and unpatched model inside torch.compile (not calibrate)",
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument(
        "--peak",
        nargs=2,
        metavar=("WHAT", "MODEL"),
        help="write the peak memory of one thing, in bytes, and end",
    )
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else CUDA if arguments.device == "cuda" else CPU
    make = partial(build, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    with one_thread(), torch.inference_mode():
        if arguments.peak:
            what, name = arguments.peak
            sys.stdout.write(f"{peak_here(what, make(name), sizes, arguments.device)}\n")
            return
        peaks = {name: {what: peak(what, name, arguments) for what in PEAKS} for name in MODELS}
        results = {
            name: {
                "time": timed(make(name), sizes, arguments.device, arguments.compile),
                "peak": peaks[name],
            }
            for name in MODELS
        }
    from rich.console import Console

    Console().print(table(results))
    if arguments.json:
        setting = {
            name: getattr(arguments, name) for name in ("quick", "device", "dtype", "compile")
        }
        setting |= {"torch": torch.__version__, "sizes": asdict(sizes)}
        arguments.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
