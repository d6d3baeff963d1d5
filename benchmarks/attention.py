"""Speed and memory of explicit attention biases and of recording, each as a ratio to the unpatched
model in the same run.

    python benchmarks/attention.py [--quick] [--lengths 512 4096] [--repeats 9] [--json FILE]
    python benchmarks/attention.py --device cuda --dtype bfloat16 [--way compiled | graphs]

One thread. Every repeat runs all variants in turn, and a ratio is the median over repeats of
(variant / unpatched of that repeat); the row "unpatched again" is the noise. Models are random, a
LLaMA with grouped heads and a GPT-2, with a vocabulary so small that the head takes the share of
the time that it takes in a large model. Two rows are what a user would write without this library:
k', v' concatenated to the keys and values behind a dense mask, and `output_attentions=True` on
eager attention. Memory is the peak of what is allocated beyond the loaded model, counted to the
byte.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "5"
)  # the profiler that counts memory is silent; read when torch is imported

import torch
from timing import interleaved, one_thread, ratios, seconds, verdict
from torch import Tensor, nn
from torch.nn import functional
from ways import WAYS, captured, compiled, ready

import biassurgery as bs

MODELS = {
    "llama": "LLaMA, 4 query heads a key head",
    "gpt2": "GPT-2",
    "smollm2": "of the shape of SmolLM2-135M",
}
VOCABULARY = 1024
LENGTHS = (512, 1024, 2048, 4096)
PROMPT = 512
WATCHED = ("sink_mass", "value_updates")
TARGETS = {
    "forward": {"attention_bias kv": 1.05, "instrument + record": 1.10},
    "forward + backward": {"attention_bias kv": 1.10},
}
# What a step of cached decoding may cost above the unpatched model measured again.
DECODE_BUDGETS = {"attention_bias kv": 0.05, "transplant": 0.05}


class Sizes(NamedTuple):
    """How large the models are, and how much is run: rows of a batch, decoding steps, repeats at
    the shortest length.
    """

    layers: int
    width: int
    rows: int
    steps: int
    repeats: int


CPU = Sizes(layers=4, width=512, rows=1, steps=32, repeats=9)
CUDA = Sizes(layers=16, width=2048, rows=4, steps=64, repeats=51)


def build(name: str, sizes: Sizes, longest: int, device: str, dtype: torch.dtype) -> Any:
    """A random causal LM with heads of 64 channels."""
    import transformers as tf

    torch.manual_seed(0)
    heads = sizes.width // 64
    if name == "gpt2":
        config: Any = tf.GPT2Config(
            n_embd=sizes.width,
            n_layer=sizes.layers,
            n_head=heads,
            n_positions=longest + 1,
            vocab_size=VOCABULARY,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    elif name == "smollm2":
        config = tf.LlamaConfig(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
    else:
        config = tf.LlamaConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            vocab_size=VOCABULARY,
            num_key_value_heads=heads // 4,
            intermediate_size=sizes.width * 11 // 4,
            max_position_embeddings=longest + 1,
        )
    return tf.AutoModelForCausalLM.from_config(config).to(device, dtype)


def tokens(model: nn.Module, rows: int, length: int) -> Tensor:
    """(rows, length) int64 random ids behind the start token 0."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return ids.to(next(model.parameters()).device)


# What is run


def forward(model: Any, ids: Tensor, **options: Any) -> Any:
    with torch.inference_mode():
        return model(ids, use_cache=False, **options)


def recorded(model: Any, ids: Tensor) -> Any:
    with bs.record(model, what=WATCHED) as found:
        forward(model, ids)
    return found


def train(model: Any, ids: Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def decode(model: Any, step: Tensor, steps: int, past: Any) -> None:
    """One token at a time behind a cache that exists already."""
    with torch.inference_mode():
        for _ in range(steps):
            model(step, past_key_values=past, use_cache=True)


# What it is run on


def bias(kind: str, model: Any) -> AbstractContextManager[Any]:
    return bs.patched(model, "attention_bias", kind=kind, init="normal")


def transplanted(model: Any) -> AbstractContextManager[Any]:
    return bs.patched(
        model,
        "transplant",
        key_values=bs.calibrate_key_values(model, tokens(model, 1, 8), progress=False),
    )


@contextmanager
def implementation(name: str, model: Any) -> Iterator[Any]:
    """The model with another attention of transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@contextmanager
def dense_column(model: Any) -> Iterator[Any]:
    """k', v' as a user would write them: one more key and value in front of the others, and a dense
    mask, made once for all layers.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("dense_column", attend_densely)
    dense_mask.cache_clear()
    attentions = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "head_dim")
    ]
    like = next(model.parameters())
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    for module in attentions:
        for name in ("k_column", "v_column"):
            setattr(
                module,
                name,
                nn.Parameter(
                    0.02 * torch.randn(heads, 1, 64, dtype=like.dtype, device=like.device)
                ),
            )
    try:
        with implementation("dense_column", model):
            yield model
    finally:
        for module in attentions:
            del module.k_column, module.v_column


@cache
def dense_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T + 1) added to the logits: the column, and the keys up to the query."""
    seen = torch.ones(length, length + 1, dtype=torch.bool, device=device).tril(1)
    return torch.zeros(length, length + 1, dtype=dtype, device=device).masked_fill_(
        ~seen, -torch.inf
    )


def attend_densely(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Any,
    scaling: float | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    key, value = (
        torch.cat([column.expand(len(x), -1, -1, -1), x], 2)
        for column, x in ((module.k_column, key), (module.v_column, value))
    )
    mask = dense_mask(query.shape[2], query.dtype, query.device)
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


class Variant(NamedTuple):
    """One row: what is on the model while it runs, and how it runs."""

    patch: Callable[[Any], AbstractContextManager[Any]]
    run: Callable[[Any, Tensor], Any] = forward


UNPATCHED = {"unpatched": Variant(nullcontext), "unpatched again": Variant(nullcontext)}
KEY_VALUE = Variant(partial(bias, "kv"))
RECORDED = Variant(lambda model: bs.patched(model, "instrument"), recorded)
DENSE = Variant(dense_column)
EAGER = Variant(partial(implementation, "eager"), partial(forward, output_attentions=True))

FORWARD = UNPATCHED | {
    "attention_bias kv": KEY_VALUE,
    "attention_bias sink_logit": Variant(partial(bias, "sink_logit")),
    "attention_bias gate": Variant(partial(bias, "gate")),
    "transplant": Variant(transplanted),
    "k', v' and a dense mask": DENSE,
    "instrument + record": RECORDED,
    "eager, output_attentions": EAGER,
}
TRAINED = {
    "unpatched": UNPATCHED["unpatched"],
    "attention_bias kv": KEY_VALUE,
    "k', v' and a dense mask": DENSE,
}
DECODED = UNPATCHED | {"attention_bias kv": KEY_VALUE, "transplant": FORWARD["transplant"]}
HELD = {
    "unpatched": UNPATCHED["unpatched"],
    "attention_bias kv": KEY_VALUE,
    "k', v' and a dense mask": DENSE,
    "instrument + record": RECORDED,
    "eager, output_attentions": EAGER,
}


# How it is measured


def timed(
    model: Any, sizes: Sizes, lengths: list[int], repeats: int, device: str, way: str
) -> dict[str, dict[int, Any]]:
    """Seconds and ratios of every section, length and row. Only forwards go into CUDA graphs;
    recording is eager.
    """
    sections = [("forward", FORWARD, False)] + [("forward + backward", TRAINED, True)] * (
        way != "graphs"
    )
    found: dict[str, dict[int, Any]] = {label: {} for label, _, _ in sections}
    for length in lengths:
        ids = tokens(model, sizes.rows, length)
        for label, rows, training in sections:

            def timer(variant: Variant, training: bool = training, ids: Tensor = ids) -> float:
                with ready(model, variant.patch, way) as m:
                    m.train(training)
                    work = partial(train if training else variant.run, m, ids)
                    return seconds(captured(work) if way == "graphs" else work, device)

            timers = {
                name: partial(timer, row)
                for name, row in rows.items()
                if way == "eager" or row not in (RECORDED, EAGER)
            }
            times = interleaved(
                timers,
                max(3, repeats * lengths[0] // length),
                warm_up=length == lengths[0] or way == "compiled",
            )
            found[label][length] = ratios(times, "unpatched")
    return found


def decoded(model: Any, sizes: Sizes, repeats: int, device: str) -> dict[str, Any]:
    """Seconds and ratios of decoding `sizes.steps` tokens behind a prompt."""
    prompt = tokens(model, sizes.rows, PROMPT)
    with torch.inference_mode():
        past = model.eval()(prompt, use_cache=True).past_key_values

    def timer(variant: Variant) -> float:
        with variant.patch(model):
            fresh = copy.deepcopy(past)
            return seconds(partial(decode, model, prompt[:, 1:2], sizes.steps, fresh), device)

    return ratios(
        interleaved({name: partial(timer, row) for name, row in DECODED.items()}, repeats),
        "unpatched",
    )


def peak(work: Callable[[], object], device: str) -> int:
    """Bytes allocated at the peak beyond what was before, scratch memory of kernels included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = work()  # held until the end, as its user would
        del kept
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [
        event.nbytes()
        for event in sorted(events, key=lambda event: event.start_ns())
        if event.name() == "[memory]"
    ]
    return max(accumulate(changes))


def peaks(model: Any, sizes: Sizes, lengths: list[int], device: str) -> dict[str, dict[int, int]]:
    """Bytes at the peak of one forward, of every row and length."""
    found: dict[str, dict[int, int]] = {}
    for name, row in HELD.items():
        with row.patch(model.eval()):
            found[name] = {
                length: peak(partial(row.run, model, tokens(model, sizes.rows, length)), device)
                for length in lengths
            }
    return found


# Output


def table(name: str, result: dict[str, Any], lengths: list[int], rows: int) -> Any:
    """Of one model: ratios, peaks, and how these grow against the unpatched model."""
    from rich.table import Table

    shown = Table(
        "",
        *map(str, lengths),
        "target",
        title=f"{MODELS[name]}: relative to the unpatched model, by length",
    )
    for label, times in result["time"].items():
        for row in [row for row in times[lengths[0]] if row != "unpatched"]:
            target = TARGETS[label].get(row)
            cells = (f"{times[length][row]['ratio']:.3f}x" for length in lengths)
            shown.add_row(f"{label}: {row}", *cells, f"{target:.2f}x" if target else "")
        shown.add_section()
    held = result.get("peak", {})
    for row, sizes in held.items():
        shown.add_row(f"peak: {row}", *(f"{sizes[length] / 1e6:,.1f} MB" for length in lengths), "")
    shown.add_section()
    for row in [row for row in held if row != "unpatched"]:
        growth = (
            f"{(held[row][length] - held['unpatched'][length]) / (rows * length):+,.0f} B"
            for length in lengths
        )
        shown.add_row(f"peak, more a token: {row}", *growth, "")
    return shown


def decode_table(results: dict[str, Any], steps: int) -> Any:
    from rich.table import Table

    shown = Table(
        "",
        *(MODELS[name] for name in results),
        "at most",
        title=f"cached decoding behind {PROMPT} tokens, a token",
    )
    for row in next(iter(results.values()))["decode"]:
        cells = []
        for found in (result["decode"] for result in results.values()):
            cell = found[row]
            said = f"{cell['ratio']:.3f}x  {cell['seconds'] / steps * 1e3:.2f} ms"
            if row in DECODE_BUDGETS:
                said += f"  {verdict(cell, found['unpatched again'], DECODE_BUDGETS[row])}"
            cells.append(said)
        budget = f"{DECODE_BUDGETS[row]:.2f} over again" if row in DECODE_BUDGETS else ""
        shown.add_row(row, *cells, budget)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="512 and 1024 tokens, three repeats")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help=f"tokens of a sequence, ascending; {' '.join(map(str, LENGTHS))}",
    )
    parser.add_argument(
        "--repeats", type=int, help="at the first length; fewer at longer ones, but at least three"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["llama", "gpt2"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--way",
        choices=WAYS,
        default="eager",
        help="graphs: CUDA graphs, forwards only; memory and decoding are measured eager only",
    )
    parser.add_argument(
        "--decode-only", action="store_true", help="cached decoding and nothing else"
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    sizes = CUDA if arguments.device == "cuda" else CPU
    lengths = arguments.lengths or list(LENGTHS[:2] if arguments.quick else LENGTHS)
    repeats = arguments.repeats or (3 if arguments.quick else sizes.repeats)
    if arguments.way == "graphs" and arguments.device == "cpu":
        parser.error("--way graphs needs --device cuda")
    from rich.console import Console

    results: dict[str, Any] = {}
    with one_thread():
        for name in arguments.models:
            model = build(
                name,
                sizes,
                max(*lengths, PROMPT + sizes.steps),
                arguments.device,
                getattr(torch, arguments.dtype),
            )
            if arguments.decode_only:
                results[name] = {"decode": decoded(model, sizes, repeats, arguments.device)}
                continue
            results[name] = {
                "time": timed(model, sizes, lengths, repeats, arguments.device, arguments.way)
            }
            compiled.cache_clear()
            if arguments.way == "eager":
                results[name] |= {
                    "decode": decoded(model, sizes, repeats, arguments.device),
                    "peak": peaks(model, sizes, lengths, arguments.device),
                }
            Console().print(table(name, results[name], lengths, sizes.rows))
    if arguments.way == "eager":
        Console().print(decode_table(results, sizes.steps))
    if arguments.json:
        setting = {name: getattr(arguments, name) for name in ("quick", "device", "dtype", "way")}
        setting |= {"torch": torch.__version__, "sizes": sizes._asdict(), "repeats": repeats}
        arguments.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
