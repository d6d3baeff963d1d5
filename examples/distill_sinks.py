"""Learned sinks for a model that has none: one logit a head takes the place of its start token.

    python examples/distill_sinks.py MODEL --start '<|im_start|>' --out runs/logit
    python examples/distill_sinks.py MODEL --start '<|im_start|>' --kind kv --out runs/kv

The teacher is the model with the start token in front. The student is the same model without it;
new parameters in every attention, and nothing else, are trained to give the teacher's next-token
distributions (KL divergence, mean over tokens). `--lora RANK` trains adapters of PEFT as well.

    sink_logit  one logit a head, whose value is 0, so that stock classes can hold it. It begins as
                a fit to the start token's exact key values
    kv          one key k' and value v' a key-value head. They begin at random, for from the exact
                key values there is nothing to learn: that is `transplant`, a row of the table

OUT gets config.json; log.jsonl, one line an evaluation; state.pt, to go on from, by the same
command, to bitwise the same end; at the end patch/ (and adapter/), what `bs.load_patch` reads, and
for sink_logit stock/, what transformers reads without this library. Table and curve:
`plot_distill_sinks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from distilled import begin, evaluate, windows
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import biassurgery as bs

KINDS = ("sink_logit", "kv")
CALIBRATED = 8  # sequences that logits are fitted to


@dataclass(frozen=True)
class Config:
    """One run. `text` and `held_out` are .txt files; None: the packaged texts."""

    model: str
    start: str
    kind: str = "sink_logit"
    lora: int = 0
    steps: int = 100
    rows: int = 4  # sequences a step
    length: int = 128  # tokens of each, the start token not counted
    rate: float = 0.1  # of the new parameters; falls to 0
    lora_rate: float = 1e-3
    every: int = 25  # steps between two evaluations
    evaluated: int = 16  # held-out sequences
    seed: int = 0
    text: str | None = None
    held_out: str | None = None


def student_of(model: Any, config: Config, logits: Tensor) -> Any:
    """The model with its new parameters, which alone are trained."""
    torch.manual_seed(config.seed)
    model.requires_grad_(False)
    if config.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=config.lora, target_modules="all-linear"))
    bs.patch_model(model, "attention_bias", kind=config.kind, init="normal")
    own = [p for name, p in model.named_parameters() if name.endswith(".sink_logit")]
    with torch.no_grad():
        for parameter, fitted in zip(own, logits):
            parameter.copy_(fitted)
    return model


def optimizer_of(trained: dict[str, Tensor], config: Config) -> torch.optim.Adam:
    rates = {True: config.lora_rate, False: config.rate}
    groups = [
        {"params": [p for name, p in trained.items() if ("lora_" in name) is lora], "rate": rate}
        for lora, rate in rates.items()
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])


def divergence(teacher: Any, student: Any, ids: Tensor, start: int) -> Tensor:
    """KL(teacher, student) of the next token after each of `ids` (B, T), mean over tokens."""
    with torch.no_grad():
        behind = nn.functional.pad(ids, (1, 0), value=start)
        wanted = teacher(input_ids=behind, use_cache=False).logits[:, 1:].float().log_softmax(-1)
    found = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()


def draw(tokens: Tensor, config: Config, step: int) -> Tensor:
    """(rows, length) ids that depend on nothing but seed and step."""
    generator = torch.Generator().manual_seed((config.seed + 1) * 1_000_003 + step)
    starts = torch.randint(len(tokens) - config.length, (config.rows, 1), generator=generator)
    return tokens[starts + torch.arange(config.length)]


def save_state(file: Path, step: int, trained: dict[str, Tensor], optimizer: Any) -> None:
    """The state, there as a whole or as it was before."""
    partial = file.with_suffix(".partial")
    own = {name: parameter.detach() for name, parameter in trained.items()}
    torch.save({"step": step, "trained": own, "optimizer": optimizer.state_dict()}, partial)
    os.replace(partial, file)


def load_state(file: Path, trained: dict[str, Tensor], optimizer: Any) -> int:
    state = torch.load(file, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def begun(config: Config, folder: Path) -> bool:
    """Whether there is a state of this very run to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(asdict(config), indent=1) + "\n"
    described = folder / "config.json"
    if described.exists() and described.read_text() != written:
        raise SystemExit(f"out: {folder} holds a run of another config; choose another --out.")
    described.write_text(written)
    return (folder / "state.pt").exists()


def log_line(folder: Path, line: dict[str, Any]) -> None:
    """Add a line; those of its step and later ones, written before a kill, come again."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [each for each in lines if json.loads(each)["step"] < line["step"]]
    log.write_text("\n".join([*kept, json.dumps(line)]) + "\n")


def distill(config: Config, folder: Path, stop_at: int | None = None) -> Any:
    """One run, from its start or its last state, to its end or until `stop_at`; the student."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    start = tokenizer.convert_tokens_to_ids(config.start)
    teacher, model = (
        AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval().to(device)
        for _ in range(2)
    )
    tokens = windows(tokenizer, config.text, "calibration").to(device)
    held = windows(tokenizer, config.held_out, "evaluation").to(device)
    held = held[: config.evaluated * config.length].view(-1, config.length)
    goes_on = begun(config, folder)
    calibration = tokens[: CALIBRATED * config.length].view(-1, config.length)
    fitted = torch.empty(0) if goes_on else begin(folder, teacher, calibration, held, start)
    student = student_of(model, config, fitted)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(trained, config)
    if goes_on:
        step = load_state(folder / "state.pt", trained, optimizer)
    else:
        step = 0
        log_line(folder, {"step": 0, "kl": None, **evaluate(student, held)})
        save_state(folder / "state.pt", 0, trained, optimizer)
    total = 0.0  # since the last evaluation, which is where a killed run goes on
    while step < config.steps and step != stop_at:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / config.steps)
        loss = divergence(teacher, student, draw(tokens, config, step).to(device), start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        step += 1
        if step % config.every == 0 or step == config.steps:
            since = step - (step - 1) // config.every * config.every
            log_line(folder, {"step": step, "kl": total / since, **evaluate(student, held)})
            save_state(folder / "state.pt", step, trained, optimizer)
            total = 0.0
    if step == config.steps:
        write_end(student, config, folder)
    return student


def write_end(student: Any, config: Config, folder: Path) -> None:
    """What is left to use: with adapters merged into the weights, or the bias alone."""
    if config.lora:
        student.save_pretrained(folder / "adapter")
        student = student.merge_and_unload()
    if not (folder / "patch").exists():
        bs.save_patch(student, folder / "patch")
    if config.kind == "sink_logit" and not (folder / "stock").exists():
        with suppress(bs.errors.MissingPackage):  # transformers 4 has no class for it
            bs.export(student, folder / "stock", format="sinks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or name of a causal language model")
    parser.add_argument("--start", required=True, help="the token that the teacher has in front")
    parser.add_argument("--kind", choices=KINDS, default="sink_logit")
    parser.add_argument("--out", type=Path, required=True)
    for field in fields(Config):
        if field.name in ("model", "start", "kind"):
            continue
        kind = type(field.default) if field.default is not None else str
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=kind, default=field.default)
    options = vars(parser.parse_args())
    folder = options.pop("out")
    distill(Config(**options), folder)


if __name__ == "__main__":
    main()
