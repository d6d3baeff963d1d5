"""The part of `gpu.py` that asks what it costs: ratios to the unpatched model in the same run, at
the shape of LLaMA-7B with random weights that are made on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from gpu_rows import Row, Skipped, Stage
from timing import interleaved, ratios, seconds, verdict
from torch import Tensor

import biassurgery as bs

CHANNELS = (5, 9)
BASE = "unpatched"
AGAIN = "unpatched again"
Patch = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sizes:
    """How large the model is, and how much is run."""

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    prefill: tuple[int, int]  # rows, tokens
    prompt: int
    steps: int
    trained: int  # tokens of the one row of a training step
    repeats: int


LLAMA_7B = Sizes(32, 4096, 32, 11008, 32000, (1, 2048), 512, 16, 1024, 15)
SMALL = Sizes(2, 64, 4, 128, 256, (1, 64), 16, 2, 16, 3)


@cache
def model_of(sizes: Sizes, device: str) -> Any:
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.inner,
        vocab_size=sizes.vocabulary,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, list(CHANNELS)] = 3000.0
    return model


def tokens(sizes: Sizes, device: str, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, sizes.vocabulary, (rows, length), generator=generator)
    ids[:, 0] = 0
    return ids.to(device)


@cache
def patches(sizes: Sizes, device: str) -> dict[str, Patch]:
    """What is on the model in each row."""
    sites = bs.Sites(
        bs.Site(layer, channel, "start", 3000.0)
        for layer in range(sizes.layers)
        for channel in CHANNELS
    )
    model = model_of(sizes, device)
    start = bs.calibrate_key_values(model, tokens(sizes, device, 1, 8), progress=False)
    return {
        BASE: nullcontext,
        AGAIN: nullcontext,
        "set_mean": lambda m: bs.patched(m, "set_mean", sites=sites),
        "set_mean, all layers": lambda m: bs.patched(m, "set_mean", sites=sites, layers="all"),
        "attention_bias kv": lambda m: bs.patched(m, "attention_bias", kind="kv", init="normal"),
        "transplant": lambda m: bs.patched(m, "transplant", key_values=start),
    }


BUDGETS = {
    ("prefill", "set_mean"): 0.01,
    ("prefill", "set_mean, all layers"): 0.01,
    ("prefill", "attention_bias kv"): 0.05,
    ("prefill", "transplant"): 0.05,
    ("prefill", "record sink_mass"): 0.10,
    ("decode", "set_mean"): 0.02,
    ("decode", "set_mean, all layers"): 0.02,
    ("decode", "attention_bias kv"): 0.05,
    ("decode", "transplant"): 0.05,
    ("training step", "attention_bias kv"): 0.10,
    ("calibrate", "calibrate"): 0.10,
}


def stages(device: str, small: bool) -> Iterator[Stage]:
    sizes = SMALL if small else LLAMA_7B
    scale = 1 if device == "cuda" or small else 100
    for section, work, took in (
        ("prefill", prefill, 40),
        ("decode", decode, 60),
        ("calibrate", calibrate, 30),
        ("training step", training, 40),
        ("memory", memory, 20),
    ):
        seconds_needed = 1 if small else took * scale
        yield Stage(section, "all", seconds_needed, partial(work, sizes, device))


def told(section: str, times: dict[str, list[float]], budgets: bool) -> list[Row]:
    """Rows of what was timed, with verdicts where there is a budget for a model of this size."""
    found = ratios(times, BASE)
    rows = []
    for name, cell in found.items():
        said = f"{cell['ratio']:.3f}x ({cell['low']:.3f} to {cell['high']:.3f})"
        budget = BUDGETS.get((section, name)) if budgets else None
        if name == BASE:
            rows.append(Row(section, name, "measured", f"{1e3 * cell['seconds']:.2f} ms"))
        elif budget is None:
            rows.append(Row(section, name, "measured", said))
        else:
            said += f", at most {budget:.2f} over {AGAIN}"
            rows.append(Row(section, name, verdict(cell, found[AGAIN], budget), said))
    return rows


@torch.no_grad()
def forward(model: Any, ids: Tensor) -> None:
    model(ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def recorded(model: Any, ids: Tensor) -> None:
    with bs.record(model, what=("sink_mass",)):
        model(ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def steps(model: Any, ids: Tensor, past: Any, count: int) -> None:
    for _ in range(count):
        model(ids, past_key_values=past, use_cache=True)


def timed(
    sizes: Sizes, device: str, section: str, work: dict[str, tuple[Patch, Callable[[Any], Any]]]
) -> list[Row]:
    """Each patch with what runs on it, in turn; what `work` returns is run on the clock."""
    model = model_of(sizes, device)

    def timer(patch: Patch, ready: Callable[[Any], Callable[[], object]]) -> float:
        with patch(model):
            return seconds(ready(model), device)

    timers = {name: partial(timer, *each) for name, each in work.items()}
    return told(section, interleaved(timers, sizes.repeats), sizes is not SMALL)


def prefill(sizes: Sizes, device: str) -> list[Row]:
    ids = tokens(sizes, device, *sizes.prefill)
    work = {
        name: (patch, lambda m: partial(forward, m, ids))
        for name, patch in patches(sizes, device).items()
    }
    work["record sink_mass"] = (nullcontext, lambda m: partial(recorded, m, ids))
    return timed(sizes, device, "prefill", work)


def decode(sizes: Sizes, device: str) -> list[Row]:
    ids = tokens(sizes, device, 1, sizes.prompt)
    with torch.no_grad():
        past = model_of(sizes, device)(ids, use_cache=True).past_key_values

    def ready(model: Any) -> Callable[[], object]:
        fresh = copy.deepcopy(past)
        steps(model, ids[:, 1:2], fresh, 1)  # warm
        return partial(steps, model, ids[:, 1:2], fresh, sizes.steps)

    work = {name: (patch, ready) for name, patch in patches(sizes, device).items()}
    return timed(sizes, device, "decode", work)


def calibrate(sizes: Sizes, device: str) -> list[Row]:
    batches = [tokens(sizes, device, *sizes.prefill) for _ in range(2)]

    def forwards(model: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)

    work: dict[str, tuple[Patch, Callable[[Any], Any]]] = {
        name: (nullcontext, lambda m: partial(forwards, m)) for name in (BASE, AGAIN)
    }
    work["calibrate"] = (
        nullcontext,
        lambda m: partial(bs.calibrate, m, batches, progress=False),
    )
    return timed(sizes, device, "calibrate", work)


def train(model: Any, ids: Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def training(sizes: Sizes, device: str) -> list[Row]:
    """Forward and backward with gradients of all weights; no optimizer."""
    ids = tokens(sizes, device, 1, sizes.trained)
    chosen = (BASE, AGAIN, "attention_bias kv")
    work = {
        name: (patch, lambda m: partial(train, m, ids))
        for name, patch in patches(sizes, device).items()
        if name in chosen
    }
    return timed(sizes, device, "training step", work)


def memory(sizes: Sizes, device: str) -> list[Row]:
    """Bytes at the peak of one forward, and of a training step, beyond the model."""
    if device == "cpu":
        raise Skipped("needs a GPU")
    model = model_of(sizes, device)
    ids = tokens(sizes, device, *sizes.prefill)
    runs = {
        ("forward", name): (patch, partial(forward, model, ids))
        for name, patch in patches(sizes, device).items()
    }
    runs["forward", "record sink_mass"] = (nullcontext, partial(recorded, model, ids))
    short = tokens(sizes, device, 1, sizes.trained)
    for name in (BASE, "attention_bias kv"):
        runs["training step", name] = (
            patches(sizes, device)[name],
            partial(train, model, short),
        )
    rows = []
    for (what, name), (patch, run) in runs.items():
        with patch(model):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = torch.cuda.max_memory_allocated() - before
        rows.append(Row("memory", f"{what}, {name}", "measured", f"{peak / 2**20:,.1f} MiB"))
    return rows
