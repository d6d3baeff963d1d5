"""What `peers.py` runs in each library's environment: one way to intervene and to measure each.

Each way is written as its library's own guide writes it. The intervention: the massive activation
of the first token becomes zero at the output of one block. The measurement: largest magnitude and
exact median of every block's output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, one_thread, seconds
from torch import Tensor, nn

BLOCK, CHANNEL, VALUE, GATE = 11, 507, 24_900.0, 5_000.0  # of SmolLM2
NEW, PROMPT = 12, 48  # tokens
START = 1  # <|im_start|>
Row = tuple[float, float]  # largest magnitude, median


class ByHand:
    """The official code: forward hooks; measured in float64 on the CPU, by sorting."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @contextmanager
    def on(self) -> Iterator[None]:
        def write(block: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, 0, CHANNEL] = 0
            return output

        hook = self.model.model.layers[BLOCK].register_forward_hook(write)
        yield
        hook.remove()

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self.on():
            return self.model(input_ids=ids, attention_mask=mask).logits

    def generate(self, ids: Tensor) -> Tensor:
        with self.on():
            return greedy(self.model, ids)

    def measure(self, ids: Tensor, mask: Tensor) -> list[Row]:
        kept: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda block, args, output: kept.append(
                    (output[0] if isinstance(output, tuple) else output).detach().clone().cpu()
                )
            )
            for block in self.model.model.layers
        ]
        self.model(input_ids=ids, attention_mask=mask)
        for hook in hooks:
            hook.remove()
        rows = []
        for hidden in kept:
            values = hidden.double().abs().flatten().sort().values
            rows.append((values[-1].item(), values[len(values) // 2].item()))
        return rows


class Biassurgery(ByHand):
    @contextmanager
    def on(self) -> Iterator[None]:
        import biassurgery as bs

        site = bs.Site(BLOCK, CHANNEL, "start", VALUE, gate=GATE)
        with bs.patched(self.model, "set_zero", sites=bs.Sites([site])):
            yield

    def measure(self, ids: Tensor, mask: Tensor) -> list[Row]:
        import biassurgery as bs

        found = bs.detect(self.model, {"input_ids": ids, "attention_mask": mask}, progress=False)
        return [(row.top[0], row.median) for row in found.layers]


class Nnsight(ByHand):
    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        from nnsight import LanguageModel

        self.wrapped = LanguageModel(model, tokenizer=tokenizer)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        lm = self.wrapped
        with lm.trace({"input_ids": ids, "attention_mask": mask}):
            lm.model.layers[BLOCK].output[:, 0, CHANNEL] = 0
            logits = lm.output.logits.save()
        return logits  # noqa: RET504  (the block above is traced, not run)

    def generate(self, ids: Tensor) -> Tensor:
        lm = self.wrapped
        with lm.generate(ids, max_new_tokens=NEW, do_sample=False):
            lm.model.layers[BLOCK].output[:, 0, CHANNEL] = 0
            out = lm.generator.output.save()
        return out  # noqa: RET504

    def measure(self, ids: Tensor, mask: Tensor) -> list[Row]:
        lm = self.wrapped
        with lm.trace({"input_ids": ids, "attention_mask": mask}):
            rows = [].save()
            for block in lm.model.layers:
                magnitudes = block.output.abs()
                rows.append((magnitudes.max(), magnitudes.median()))
        return [(top.item(), median.item()) for top, median in rows]


class Pyvene(ByHand):
    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        import pyvene as pv

        place = f"model.layers[{BLOCK}].output"
        self.wrapped = pv.IntervenableModel(
            {"component": place, "intervention": self.zero}, model=model
        )
        self.collect = pv.IntervenableModel(
            [
                {
                    "component": f"model.layers[{at}].output",
                    "intervention": pv.CollectIntervention(),
                }
                for at in range(len(model.model.layers))
            ],
            model=model,
        )

    @staticmethod
    def zero(base: Tensor, source: Any) -> Tensor:
        base = base.clone()
        base[..., CHANNEL] = 0
        return base

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask}
        return self.wrapped(inputs, unit_locations={"base": 0})[1].logits

    def generate(self, ids: Tensor) -> Tensor:
        return self.wrapped.generate(
            {"input_ids": ids},
            unit_locations={"base": 0},
            intervene_on_prompt=True,
            max_new_tokens=NEW,
            do_sample=False,
        )[1]

    def measure(self, ids: Tensor, mask: Tensor) -> list[Row]:
        everywhere = {"base": list(range(ids.shape[1]))}
        inputs = {"input_ids": ids, "attention_mask": mask}
        (_, kept), _ = self.collect(inputs, unit_locations=everywhere)
        return [(x.abs().max().item(), x.abs().median().item()) for x in kept]


class TransformerLens(ByHand):
    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            model.config._name_or_path, hf_model=model, tokenizer=tokenizer, device="cpu"
        )
        self.hooks = [(f"blocks.{BLOCK}.hook_out", self.zero)]

    @staticmethod
    def zero(hidden: Tensor, hook: Any) -> Tensor:
        hidden[:, 0, CHANNEL] = 0
        return hidden

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=self.hooks)

    def generate(self, ids: Tensor) -> Tensor:
        with self.bridge.hooks(fwd_hooks=self.hooks):
            return self.bridge.generate(
                ids, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False
            )

    def measure(self, ids: Tensor, mask: Tensor) -> list[Row]:
        _, cache = self.bridge.run_with_cache(
            ids,
            attention_mask=mask,
            names_filter=lambda name: name.endswith(".hook_out") and name.count(".") == 2,
        )
        kept = [cache[f"blocks.{at}.hook_out"] for at in range(len(self.model.model.layers))]
        return [(x.abs().max().item(), x.abs().median().item()) for x in kept]


WAYS: dict[str, Any] = {
    "by hand": ByHand,
    "biassurgery": Biassurgery,
    "nnsight": Nnsight,
    "pyvene": Pyvene,
    "TransformerLens": TransformerLens,
    "kvpress": None,
}


def greedy(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)


def oracle_tokens(way: ByHand, ids: Tensor) -> Tensor:
    """Greedy, without a cache: the whole text anew for each token."""
    hand = ByHand(way.model, way.tokenizer)
    for _ in range(NEW):
        logits = hand.logits(ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def off(way: ByHand, text: Tensor) -> dict[str, str | None]:
    """Of each situation, by how much it is not what the oracle says; None: it is."""
    hand = ByHand(way.model, way.tokenizer)
    ids = text[None, :PROMPT]
    ones = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (16, 0), value=2)
    mask = torch.nn.functional.pad(ones, (16, 0))
    whole = hand.logits(ids, ones)
    alone = (way.logits(ids, ones) - whole).abs().max().item()
    behind = (way.logits(padded, mask)[:, 16:] - whole).abs().max().item()
    wanted = oracle_tokens(way, ids)[0, PROMPT:].tolist()
    got = way.generate(ids)[0, PROMPT:].tolist()
    same = sum(one == other for one, other in zip(got, wanted))
    plain = ByHand(way.model, way.tokenizer).measure(ids, ones)
    rows = way.measure(padded, mask)
    apart = max(abs(row[1] / want[1] - 1) for row, want in zip(rows, plain))
    return {
        "alone": None if alone < 1e-2 else f"{alone:.1f}",
        "left padding": None if behind < 1e-2 else f"{behind:.1f}",
        "decode": None if same == NEW else f"{same} of {NEW} tokens",
        "padded median": None if apart < 0.01 else f"{apart:.0%}",
    }


def peak(run: Callable[[], Any]) -> int:
    """Bytes beyond what is resident before it (Linux)."""
    run()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is there
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if what in x)
    return int(line.split()[1]) * 1024


def timed(run: Callable[[], Any], base: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Ratio to what the same model does unpatched, and that of the unpatched model again."""
    runs = {"plain": base, "again": base, "run": run}
    times = interleaved(
        {name: lambda each=each: seconds(each, "cpu") for name, each in runs.items()}, repeats
    )
    ratio = {
        name: statistics.median(one / other for one, other in zip(times[name], times["plain"]))
        for name in ("again", "run")
    }
    return {
        "ratio": ratio["run"],
        "again": ratio["again"],
        "seconds": statistics.median(times["run"]),
    }


def of(way: ByHand, text: Tensor, length: int, repeats: int) -> dict[str, Any]:
    ids = text[None, :length]
    ones = torch.ones_like(ids)
    prompt = text[None, :PROMPT]

    def forward() -> Any:
        return ByHand(way.model, way.tokenizer).model(input_ids=ids, attention_mask=ones)

    return {
        "off": off(way, text),
        "prefill": timed(lambda: way.logits(ids, ones), forward, repeats),
        "decode": timed(lambda: way.generate(prompt), lambda: greedy(way.model, prompt), repeats),
        "measure": timed(lambda: way.measure(ids, ones), forward, repeats),
        "memory": peak(lambda: way.measure(ids, ones)),
    }


def evicted(model: Any, text: Tensor) -> dict[str, Any]:
    """Perplexity of 64 tokens behind a prompt of 256 whose cache keeps a quarter."""
    from kvpress import StreamingLLMPress

    import biassurgery as bs

    ids = text[None, :320]
    key_values = bs.calibrate_key_values(model, ids)

    def behind(press: Any, first: int = 0) -> float:
        from transformers import DynamicCache

        cache = DynamicCache()
        with press(model):
            model(ids[:, first:256], past_key_values=cache, use_cache=True)
        positions = torch.arange(256, 320)[None]
        logits = model(ids[:, 256:], past_key_values=cache, position_ids=positions).logits
        return nn.functional.cross_entropy(logits[0, :-1], ids[0, 257:]).exp().item()

    @contextmanager
    def nothing(model: Any) -> Iterator[None]:
        yield

    def transplanted() -> float:
        with bs.patched(model, "transplant", key_values=key_values):
            return behind(StreamingLLMPress(0.75, n_sink=0), first=1)

    rows = {
        "all of it": lambda: behind(nothing),
        "kvpress, StreamingLLM without sinks": lambda: behind(StreamingLLMPress(0.75, n_sink=0)),
        "kvpress, StreamingLLM with 4 sinks": lambda: behind(StreamingLLMPress(0.75, n_sink=4)),
        "kvpress without sinks, under biassurgery's transplant": transplanted,
        "biassurgery, SinkCache of the same size": lambda: sink_cache(model, ids),
    }
    found = {}
    for name, run in rows.items():
        value: list[float] = []
        spent = seconds(lambda run=run, value=value: value.append(run()), "cpu")
        found[name] = {"perplexity": value[0], "seconds": spent}
    return {"eviction": found}


def sink_cache(model: Any, ids: Tensor) -> float:
    import biassurgery as bs

    cache = bs.SinkCache(model, window=64, sinks=4)
    return bs.streaming_perplexity(model, ids[0], cache, skip=257, progress=False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from biassurgery.data.packaged import packaged_text

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    words = tokenizer(packaged_text("evaluation")[:8000], return_tensors="pt").input_ids[0]
    text = torch.cat([torch.tensor([START]), words])
    with one_thread():
        if WAYS[arguments.way] is None:
            result = evicted(model, text)
        else:
            way = WAYS[arguments.way](model, tokenizer)
            result = of(way, text, arguments.length, arguments.repeats)
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
