"""The part of `gpu.py` that asks whether numbers are right: every mode, in bfloat16 and float16,
run eagerly, compiled, as a CUDA graph, without waiting for the device, and on two streams.

What is right is what the same patched model gives on the CPU in float32, with the weights rounded
to the dtype. A patched model may be off by three times as much as the unpatched one is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from gpu_models import CASES, FIRST, HOSTS, Case
from gpu_rows import Row, Skipped, Stage, held
from torch import Tensor
from ways import captured

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SLACK = 3.0  # times the unpatched model's own error
PREFIX = 8  # tokens of a prompt that are read at once, the others one by one


def stages(device: str, small: bool) -> tuple[Iterator[Stage], Iterator[Stage]]:
    """What comes before the ratios, and what comes behind them: compiling takes its time."""
    names = list(FIRST if small else CASES)
    first = [
        Stage("right", f"{name}, {dtype}", 2, partial(every_way, name, dtype, device))
        for dtype in DTYPES
        for name in names
        if CASES[name].float16 or dtype != "float16"
    ]
    built = [
        Stage("compiled", f"{name}, {dtype}", 15, partial(compiled, name, dtype, device))
        for dtype in DTYPES
        for name in names
        if CASES[name].float16 or dtype != "float16"
    ]
    if small:
        built = [stage for stage in built if stage.name == "attention_bias kv, bfloat16"]
    # In bfloat16 the most used come first.
    return iter(first + built[: len(FIRST)]), iter(built[len(FIRST) :])


def logits(model: Any, batch: Tensor) -> Tensor:
    """What a model returns, without a cache."""
    output = model(batch) if batch.is_floating_point() else model(batch, use_cache=False)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def decoded(model: Any, ids: Tensor) -> Tensor:
    """The same logits from a prompt and single tokens behind it."""
    output = model(ids[:, :PREFIX], use_cache=True)
    parts = [output.logits]
    for at in range(PREFIX, ids.shape[1]):
        output = model(ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return torch.cat(parts, 1)


@cache
def there(host: str, dtype: str, device: str) -> tuple[Any, Tensor, Tensor]:
    """A model and its two batches on the device, in a dtype."""
    model, batches = HOSTS[host]()
    model = copy.deepcopy(model).to(device, DTYPES[dtype])
    one, other = (
        batch.to(device, DTYPES[dtype]) if batch.is_floating_point() else batch.to(device)
        for batch in batches
    )
    return model, one, other


@cache
@torch.no_grad()
def wanted(name: str | None, host: str, dtype: str, second: bool) -> Tensor:
    """What a model, patched or not, gives on the CPU in float32."""
    model, batches = HOSTS[host]()
    model = copy.deepcopy(model).to(DTYPES[dtype]).float()
    batch = batches[second]
    if batch.is_floating_point():
        batch = batch.to(DTYPES[dtype]).float()
    if name is None:
        return logits(model, batch)
    with CASES[name].on(model):
        return logits(model, batch)


def error(found: Tensor, right: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((found.float().cpu() - right).abs().max() / right.abs().max()).item()


@cache
def own_error(host: str, dtype: str, device: str) -> float:
    """Of the unpatched model."""
    model, batch, _ = there(host, dtype, device)
    with torch.no_grad():
        return error(logits(model, batch), wanted(None, host, dtype, False))


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """Within it, waiting for the device raises."""
    if device == "cpu":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@torch.no_grad()
def every_way(name: str, dtype: str, device: str) -> list[Row]:
    """Eager, decoded, without waiting, as a graph, on two streams, and undone."""
    case = CASES[name]
    model, batch, other = there(case.host, dtype, device)
    before = logits(model, batch)
    allowed = SLACK * own_error(case.host, dtype, device)
    rows = partial(held, "right")
    found: list[Row] = []
    with case.on(model):
        eager = logits(model, batch)
        found += rows(f"{name}, {dtype}: eager", *_close(case, name, dtype, eager, allowed))
        if case.host == "text" and not case.random:
            off = error(decoded(model, batch), eager.float().cpu())
            found += rows(f"{name}, {dtype}: decoded", off <= allowed, f"off by {off:.1e}")
        found += _not_waiting(name, dtype, device, model, batch, case)
        if device == "cuda":
            found += _graph(name, dtype, model, batch, other, case)
            found += _two_streams(name, dtype, model, (batch, other), case, allowed)
    undone = torch.equal(logits(model, batch), before)
    return found + rows(f"{name}, {dtype}: undone", undone, "bit by bit")


def _close(case: Case, name: str, dtype: str, eager: Tensor, allowed: float) -> tuple[bool, str]:
    """Whether the numbers are those of the CPU, where that can be asked, and others than before."""
    plain = wanted(None, case.host, dtype, False)
    if case.random:
        differs = error(eager, plain)
        return bool(eager.isfinite().all()) and differs > 0, f"random; changed by {differs:.1e}"
    right = wanted(name, case.host, dtype, False)
    off = error(eager, right)
    effect = error(right, plain)
    said = f"off by {off:.1e}, {allowed:.1e} allowed; the patch changes {effect:.1e}"
    return off <= allowed and (effect > 2 * off or not case.changes), said


def _not_waiting(
    name: str, dtype: str, device: str, model: Any, batch: Tensor, case: Case
) -> list[Row]:
    """A forward in which waiting for the device raises, if the unpatched model's does not."""
    label = f"{name}, {dtype}: never waits"
    if device == "cpu":
        return [Row("right", label, "skipped", "needs a GPU")]
    if not _waits_itself(case.host, dtype, device):
        with never_waiting(device):
            logits(model, batch)
        return held("right", label, True, "set_sync_debug_mode('error')")
    return [Row("right", label, "skipped", "the unpatched model itself waits")]


@cache
def _waits_itself(host: str, dtype: str, device: str) -> bool:
    """Whether the unpatched model waits for the device: of a copy, for this one is patched."""
    model, batch, _ = there(host, dtype, device)
    plain = copy.deepcopy(HOSTS[host]().model).to(device, next(model.parameters()).dtype)
    logits(plain, batch)
    try:
        with never_waiting(device):
            logits(plain, batch)
    except RuntimeError:
        return True
    return False


def _graph(
    name: str, dtype: str, model: Any, batch: Tensor, other: Tensor, case: Case
) -> list[Row]:
    """A captured forward, replayed on another batch."""
    label = f"{name}, {dtype}: CUDA graph"
    static = batch.clone()
    kept: list[Tensor] = []
    replay = captured(lambda: kept.append(logits(model, static)))
    static.copy_(other)
    replay()
    torch.cuda.synchronize()
    if case.random:
        return held("right", label, bool(kept[-1].isfinite().all()), "random; finite")
    off = error(kept[-1], logits(model, other).float().cpu())
    return held("right", label, off <= 1e-6, f"off by {off:.1e} from eager on another batch")


def _two_streams(
    name: str, dtype: str, model: Any, batches: tuple[Tensor, ...], case: Case, allowed: float
) -> list[Row]:
    """Two batches on two streams at once."""
    label = f"{name}, {dtype}: two streams"
    if case.random:
        return [Row("right", label, "skipped", "random")]
    alone = [logits(model, each) for each in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in alone]
    together: list[Tensor] = []
    for stream, each in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(4):
                result = logits(model, each)
            together.append(result)
    torch.cuda.synchronize()
    # cuBLAS may choose another algorithm where two streams are at work.
    off = max(error(two, one.float().cpu()) for one, two in zip(alone, together, strict=True))
    return held("right", label, off <= allowed, f"off by {off:.1e} from one stream")


@torch.no_grad()
def compiled(name: str, dtype: str, device: str) -> list[Row]:
    """Patched and compiled as one graph: the same numbers."""
    case = CASES[name]
    if case.random:
        raise Skipped("random")
    model, batch, _ = there(case.host, dtype, device)
    allowed = SLACK * own_error(case.host, dtype, device)
    torch._dynamo.reset()
    run: Callable[[Any], Tensor] = torch.compile(
        lambda read: logits(model, read), fullgraph=True, dynamic=False
    )
    with case.on(model):
        off = error(run(batch), wanted(name, case.host, dtype, False))
    return held("compiled", f"{name}, {dtype}", off <= allowed, f"off by {off:.1e}, {allowed:.1e}")
