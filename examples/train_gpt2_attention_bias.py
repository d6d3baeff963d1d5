"""Train GPT-2 with explicit attention biases, with a sink token, and as it is: do massive
activations appear?

    python examples/train_gpt2_attention_bias.py --task backcopy --way default --out runs/backcopy
    python examples/train_gpt2_attention_bias.py --task text --way bias --out runs/text
    python examples/train_gpt2_attention_bias.py --preset gpu --text FOLDER --way bias --out runs/g
    accelerate launch --multi_gpu --mixed_precision bf16 --dynamo_backend inductor \\
        examples/train_gpt2_attention_bias.py --task text --config examples/gpt2.json --way bias \\
        --out runs/gpt2

The experiment of Sun et al. 2024, section 4.3 (figures 9 and 10). The three ways differ in one
thing only:

    default  GPT-2 as it is
    sink     a reserved token, learned like any other, comes before every sequence. It is never a
             target, and the token that follows it is not one either, so that all three ways are
             trained and judged on the same targets
    bias     learnable k', v' for every head (equation 3): patch_model(model, "attention_bias",
    kind="kv", init="normal")

A run writes, in OUT/<way>-<seed>: config.json; log.jsonl, one line an evaluation; step_<n>, the
state to go on from; model, the end. The same command goes on where a run was killed, and ends in
the same weights. Figures: `plot_gpt2_attention_bias.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from backcopy import Backcopy
from local_text import LocalText
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import GPT2Config, GPT2LMHeadModel

import biassurgery as bs

WAYS = ("default", "sink", "bias")
LOOKED = 2**18  # attention probabilities a head that an evaluation keeps at a time


@dataclass(frozen=True)
class Config:
    """One experiment. `batch` sequences make a step, on however many devices; each device takes
    `rows` of them at a time.
    """

    task: str
    layers: int = 3
    heads: int = 2
    width: int = 64
    length: int = 32  # tokens that the model reads, the sink token not counted
    steps: int = 2500
    batch: int = 32
    rows: int = 32
    rate: float = 4e-3
    warmup: int = 100
    last_rate: float = 1.0  # share of `rate` that a cosine ends in; 1: constant
    decay: float = 0.0  # weight decay of everything with two or more dimensions
    beta2: float = 0.99
    clip: float = 1.0
    every: int = 250  # steps between two evaluations, each with a checkpoint
    evaluated: int = 64  # sequences
    text: str | None = None
    tokenizer: str | None = None


TASKS = {
    "backcopy": Config("backcopy"),
    "text": Config(
        "text", layers=4, heads=4, width=128, length=64, rate=2e-3, last_rate=0.1, decay=0.1
    ),
}

# For one GPU: 32 million parameters, 245,760 tokens a step, each way in a third of twelve minutes.
PRESETS = {
    "gpu": Config(
        "text",
        layers=10,
        heads=8,
        width=512,
        length=1024,
        steps=500,
        batch=240,
        rows=24,
        rate=1e-3,
        warmup=50,
        last_rate=0.1,
        decay=0.1,
        beta2=0.95,
        every=100,
        evaluated=24,
    )
}
MINUTES = {"gpu": 4.0}
ACCELERATED = {"gpu": {"mixed_precision": "bf16", "dynamo_backend": "inductor"}}


class Task(Protocol):
    """Where sequences come from."""

    tokens: int

    def sample(
        self, rows: int, length: int, generator: torch.Generator, held_out: bool = False
    ) -> Tensor: ...

    def scores(self, logits: Tensor, ids: Tensor) -> dict[str, float]: ...


def task_of(config: Config) -> Task:
    return Backcopy() if config.task == "backcopy" else LocalText(config.text, config.tokenizer)


def build_model(config: Config, tokens: int, way: str) -> GPT2LMHeadModel:
    """GPT-2 with one id and one position to spare for the sink token: the same shapes, and first
    weights, whichever way.
    """
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokens + 1,
            n_positions=config.length + 1,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own gelu in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokens,
            eos_token_id=tokens,
            use_cache=False,
        )
    )
    return (
        bs.patch_model(model, mode="attention_bias", kind="kv", init="normal")
        if way == "bias"
        else model
    )


def inputs(ids: Tensor, tokens: int, way: str) -> Tensor:
    """What the model reads of sequences (B, length + 1): all but the last token, behind the sink
    token if there is one.
    """
    return pad(ids[:, :-1], (1, 0), value=tokens) if way == "sink" else ids[:, :-1]


def predict(model: torch.nn.Module, ids: Tensor, tokens: int, way: str) -> Tensor:
    """Logits (B, length, tokens + 1) for the token after each of `ids` (B, length + 1), but the
    last.
    """
    logits = model(input_ids=inputs(ids, tokens, way)).logits
    return logits[:, 1:] if way == "sink" else logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def draw(task: Task, rows: int, config: Config, seed: int, held_out: bool = False) -> Tensor:
    """Sequences (rows, length + 1) that depend on nothing but the seed: nothing to restore after a
    kill.
    """
    return task.sample(rows, config.length + 1, torch.Generator().manual_seed(seed), held_out)


def rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine down to `last_rate`."""
    left = (1 + math.cos(math.pi * step / config.steps)) / 2
    return (
        config.rate
        * min(1.0, (step + 1) / config.warmup)
        * (config.last_rate + (1 - config.last_rate) * left)
    )


@torch.no_grad()
def look(model: GPT2LMHeadModel, read: Tensor) -> dict[str, Any]:
    """Where the largest magnitudes sit and what attention rests on, per layer, as means over
    sequences.

    Returns:
        `first`, `rest`: the largest magnitude on the first token that is read, and on all others.
            Per layer and head, over the queries
        of the second half: `share` of attention that the most attended `position` takes;
            `bias_share`, what the explicit bias takes.
    """
    half = read.shape[1] // 2
    with bs.record(model, what=("block_output", "probs", "bias_mass")) as seen:
        model(input_ids=read)
    found: dict[str, Any] = {
        name: [] for name in ("first", "rest", "share", "position", "bias_share")
    }
    for layer in range(model.config.n_layer):
        magnitude = seen["block_output"][layer].abs().amax(-1)
        found["first"].append(magnitude[:, 0].mean().item())
        found["rest"].append(magnitude[:, 1:].amax(1).mean().item())
        top = seen["probs"][layer][:, :, half:].float().mean((0, 2)).max(-1)
        found["share"].append(top.values.tolist())
        found["position"].append(top.indices.tolist())
        found["bias_share"].append(
            seen["bias_mass"][layer][:, :, half:].float().mean((0, 2)).tolist()
        )
    return found


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, task: Task, config: Config, way: str) -> dict[str, Any]:
    """Loss, the task's own scores, magnitudes at every block's output, and attention sinks, on
    held-out sequences.
    """
    model.eval()
    ids = draw(task, config.evaluated, config, seed=-1, held_out=True).to(model.device)
    losses = []
    scores = []
    weights = []
    for part in ids.split(config.rows):
        logits = predict(model, part, task.tokens, way)
        losses.append(loss_of(logits, part).item())
        scores.append(task.scores(logits, part))
        weights.append(len(part) / len(ids))
    read = inputs(ids, task.tokens, way)
    detection = bs.detect(model, list(read.split(config.rows)), progress=False)
    model.train()
    return {
        "loss": sum(w * loss for w, loss in zip(weights, losses)),
        **{name: sum(w * score[name] for w, score in zip(weights, scores)) for name in scores[0]},
        "top": [layer.top for layer in detection.layers],
        "median": [layer.median for layer in detection.layers],
        "massive": [[p.layer, p.position, p.count] for p in detection.positions],
        **look(model, read[: max(1, LOOKED // read.shape[1] ** 2)]),
    }


def optimizer_of(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, config.beta2))


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """The state in `step_<n>`, there as a whole or not at all; earlier ones go."""
    partial = folder / "partial"
    whole = folder / f"step_{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        earlier = list(folder.glob("step_*"))
        partial.rename(whole)
        for old in earlier:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def last_step(folder: Path) -> int | None:
    """The step of the last whole state, if any."""
    return max((int(state.name[5:]) for state in folder.glob("step_*")), default=None)


def train(
    config: Config,
    way: str,
    seed: int,
    folder: Path,
    stop_at: int | None = None,
    minutes: float = math.inf,
    **accelerated: Any,
) -> None:
    """One run, from its start or from its last state, to its end or until `stop_at`.

    After so many minutes it evaluates, keeps its state and stops. `accelerated`: for `Accelerator`.
    """
    deadline = time.monotonic() + 60 * minutes
    accelerator = Accelerator(**accelerated)
    accumulation, rest = divmod(config.batch, config.rows * accelerator.num_processes)
    if rest:
        raise SystemExit(
            f"batch: {config.batch} is no multiple of rows {config.rows} x"
            f" {accelerator.num_processes} devices."
        )
    accelerator.gradient_accumulation_steps = accumulation
    set_seed(seed)
    task = task_of(config)
    bare = build_model(config, task.tokens, way)
    model, optimizer = accelerator.prepare(bare, optimizer_of(bare, config))
    log = folder / "log.jsonl"
    written = {**asdict(config), "way": way, "seed": seed}
    start = last_step(folder)
    if start is None:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
            log.write_text("")
    else:
        if json.loads((folder / "config.json").read_text()) != written:
            raise SystemExit(f"config: {folder} holds a run of another one; choose another --out.")
        accelerator.load_state(str(folder / f"step_{start}"))
        if accelerator.is_main_process:  # what was logged after the state was saved comes again
            log.write_text(
                "".join(
                    line
                    for line in log.read_text().splitlines(True)
                    if json.loads(line)["step"] <= start
                )
            )
    step = start or 0
    while True:
        late = time.monotonic() > deadline
        if (late or step % config.every == 0 or step == config.steps) and step != start:
            line = {"step": step, **evaluate(bare, task, config, way)}
            if accelerator.is_main_process:
                with log.open("a") as stream:
                    stream.write(json.dumps(rounded(line)) + "\n")
            save_state(accelerator, folder, step)
        if late or step in (config.steps, stop_at):
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step)
        ids = draw(task, config.batch, config, seed=(seed + 1) * 1_000_003 + step)
        for part in (
            ids.chunk(accelerator.num_processes)[accelerator.process_index]
            .to(accelerator.device)
            .split(config.rows)
        ):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(predict(model, part, task.tokens, way), part))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip)
                optimizer.step()
                optimizer.zero_grad()
        step += 1
    if step == config.steps and accelerator.is_main_process:
        bare.save_pretrained(folder / "model")
        if way == "bias":
            bs.save_patch(bare, folder / "model")


def rounded(value: Any) -> Any:
    """Numbers of a log line, to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS)
    what.add_argument("--preset", choices=PRESETS, help="gpu: 4 minutes a way, bfloat16, compiled")
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON object with the fields of Config that differ from the task's or preset's",
    )
    parser.add_argument("--text", help="a .txt file or a folder of them; without it: the packaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--stop-after", type=int, help="stop before this step as a kill would, to go on later"
    )
    parser.add_argument(
        "--minutes", type=float, help="evaluate, keep the state and stop after so many; gpu: 4"
    )
    arguments = parser.parse_args()
    changed = json.loads(arguments.config.read_text()) if arguments.config else {}
    if arguments.text:
        changed["text"] = arguments.text
    preset = arguments.preset
    config = replace(PRESETS[preset] if preset else TASKS[arguments.task], **changed)
    train(
        config,
        arguments.way,
        arguments.seed,
        arguments.out / f"{arguments.way}-{arguments.seed}",
        arguments.stop_after,
        MINUTES.get(preset, math.inf) if arguments.minutes is None else arguments.minutes,
        **ACCELERATED.get(preset, {}),
    )


if __name__ == "__main__":
    main()
