"""Does a server say what the exports say? Writes them here, and asks vLLM, in its own environment.

    python benchmarks/served.py write MODEL FOLDER --start TOKEN   # with this library
    python benchmarks/served.py ask FOLDER                         # where vLLM is installed

`write` exports a model in every way that a server might take, and keeps beside each what it must
say: log-probabilities of a prompt, and how it goes on. `ask` loads each folder, a process each, and
prints the largest difference over the tokens that the server thinks likeliest, and whether it goes
on alike; or what it refuses with. `ask` needs vLLM, torch and safetensors, and nothing of this
library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NEW, LIKELIEST, WINDOW = 12, 200, 16
TEXTS, LENGTH = 4, 48  # what is calibrated on, and what sinks are fitted to
REFUSED = ("Error: ", "Error(")


class Case(NamedTuple):
    """What is in a folder, and what a model there must say of a prompt (T,)."""

    folder: str
    prompt: Tensor
    logits: Tensor  # (T, vocabulary)
    greedy: list[int]
    adapter: str = ""  # a folder of the same, on top of it


def says(model: Any, prompt: Tensor) -> tuple[Tensor, list[int]]:
    """Its logits (T, vocabulary), and how it goes on."""
    with torch.no_grad():
        logits = model(prompt[None]).logits[0]
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        ones = torch.ones_like(prompt[None])
        whole = model.generate(prompt[None], attention_mask=ones, **options)
    return logits, whole[0, len(prompt) :].tolist()


def cases(model: Any, batches: list[Tensor], prompt: Tensor, out: Path) -> Iterator[Case]:
    """Export in every way. Batches and the prompt begin with the start token."""
    import biassurgery as bs

    key_values = bs.calibrate_key_values(model, batches)
    model.save_pretrained(out / "start token in the prompt")
    yield Case("start token in the prompt", prompt, *says(model, prompt))
    with bs.patched(model, "rescale", factor=2.0**-4):
        bs.export(model, out / "checkpoint", format="checkpoint")
        yield Case("checkpoint", prompt, *says(model, prompt))
    with bs.patched(model, "transplant", key_values=key_values):
        model.save_pretrained(out / "saved with transplant")
        yield Case("saved with transplant", prompt[1:], *says(model, prompt[1:]))
        bs.export(model, out / "cartridge", format="cartridge")
        expected = says(model, prompt[1:])
        yield Case("start token in the prompt", prompt[1:], *expected, adapter="cartridge")
        if has_sinks():
            texts = [batch[:, 1:] for batch in batches]
            bs.export(model, out / "sinks", format="sinks", batches=texts)
            yield from of_sinks(out, prompt[1:])
    sites = bs.calibrate(model, batches)
    with bs.patched(model, "set_zero", sites=sites):
        model.save_pretrained(out / "saved with set_zero")
        yield Case("saved with set_zero", prompt, *says(model, prompt))


def has_sinks() -> bool:
    import transformers

    return hasattr(transformers, "GraniteSWAForCausalLM")


def of_sinks(out: Path, prompt: Tensor) -> Iterator[Case]:
    """As transformers runs it: as it was written, and with a window of a few tokens."""
    from transformers import AutoModelForCausalLM

    for name, window in (("sinks", 0), ("sinks, sliding window", WINDOW)):
        stock: Any = AutoModelForCausalLM.from_pretrained(
            out / "sinks", attn_implementation="eager", dtype=torch.float32
        )
        if window:
            stock.config.layer_types = ["sliding_attention"] * stock.config.num_hidden_layers
            stock.config.sliding_window = window
            stock.save_pretrained(out / name)
            stock = AutoModelForCausalLM.from_pretrained(
                out / name, attn_implementation="eager", dtype=torch.float32
            )
        yield Case(name, prompt, *says(stock.eval(), prompt))


def keep(case: Case, number: int, out: Path) -> None:
    """The case as `NUMBER.safetensors` and `NUMBER.json`, for a process without this library."""
    tensors = {"prompt": case.prompt, "logits": case.logits.float()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, kept(out, number))
    named = {"folder": case.folder, "greedy": case.greedy, "adapter": case.adapter}
    (out / f"{number}.json").write_text(json.dumps(named))


def kept(out: Path, number: int) -> Path:
    return out / f"{number}.safetensors"


def read(out: Path, number: int) -> Case:
    tensors = load_file(kept(out, number))
    named = json.loads((out / f"{number}.json").read_text())
    folder, greedy, adapter = named["folder"], named["greedy"], named["adapter"]
    return Case(folder, tensors["prompt"], tensors["logits"], greedy, adapter)


def write(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from biassurgery.data.packaged import packaged_text

    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    start = torch.tensor([[tokenizer.convert_tokens_to_ids(arguments.start)]])

    def tokens(text: str, most: int) -> Tensor:
        ids = tokenizer(packaged_text(text)[: 20 * most], return_tensors="pt")["input_ids"]
        return ids[ids != start][:most]

    rows = tokens("calibration", TEXTS * LENGTH).reshape(TEXTS, LENGTH)
    batches = [torch.cat([start.repeat(TEXTS, 1), rows], 1)]
    prompt = torch.cat([start[0], tokens("evaluation", arguments.length)])
    arguments.folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a format loses stands in docs/serving.md
        for number, case in enumerate(cases(model, batches, prompt, arguments.folder)):
            keep(case, number, arguments.folder)
            tokenizer.save_pretrained(arguments.folder / case.folder)


Found = tuple[list[dict[int, float]], list[int]]  # log-probabilities from token 1 on; continuation


def row(case: Case, serve: Callable[[Case], Found]) -> str:
    """One row of the table: how far the server is off, or what it refuses with."""
    likeliest, greedy = serve(case)
    expected = case.logits.double().log_softmax(-1)
    off = max(
        abs(found - expected[at, token].item())
        for at, tokens in enumerate(likeliest)
        for token, found in tokens.items()
    )
    name = case.adapter or case.folder
    return f"| {name} | {off:.1e} | {'yes' if greedy == case.greedy else 'no'} |"


def by_vllm(case: Case, out: Path, options: dict[str, Any]) -> Found:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    several = {"enable_lora": bool(case.adapter), "max_logprobs": LIKELIEST + 1, "max_num_seqs": 4}
    length = len(case.prompt) + 2 * NEW
    whole: dict[str, Any] = several | {"dtype": "float32", "max_model_len": length} | options
    server: Any = LLM(model=str(out / case.folder), **whole)
    adapter = LoRARequest("adapter", 1, str(out / case.adapter)) if case.adapter else None
    wanted = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=LIKELIEST, ignore_eos=True
    )
    prompt: Any = {"prompt_token_ids": case.prompt.tolist()}
    [answer] = server.generate(prompt, wanted, lora_request=adapter)
    likeliest = [{t: p.logprob for t, p in place.items()} for place in answer.prompt_logprobs[1:]]
    return likeliest, list(answer.outputs[0].token_ids)


def ask(arguments: argparse.Namespace) -> None:
    """One process a case: what a server leaves behind is in nobody's way."""
    print("| export | largest difference | goes on alike |\n| --- | ---: | --- |")  # noqa: T201
    out = arguments.folder
    for number in range(len(list(out.glob("*.json")))):
        command = [sys.executable, __file__, "one", out, str(number), arguments.options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        case = read(out, number)
        errors = [x for x in done.stderr.splitlines() if any(name in x for name in REFUSED)]
        said = errors[-1][-300:] if errors else done.stderr[-300:]
        refused = f"| {case.adapter or case.folder} | refused | {said} |"
        print(rows[0] if rows else refused, flush=True)  # noqa: T201


def one(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = json.loads(arguments.options)
    case = read(arguments.folder, arguments.number)
    found = row(case, lambda case: by_vllm(case, arguments.folder, options))
    print(found)  # noqa: T201


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write")
    writing.add_argument("model")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--start", required=True, help="the start token, as it is written")
    writing.add_argument("--length", type=int, default=160, help="tokens of the prompt")
    writing.set_defaults(run=write)
    asking = commands.add_parser("ask")
    asking.add_argument("folder", type=Path)
    asking.add_argument("--options", default="{}", help="of vllm.LLM, as JSON")
    asking.set_defaults(run=ask)
    single = commands.add_parser("one")
    single.add_argument("folder", type=Path)
    single.add_argument("number", type=int)
    single.add_argument("options")
    single.set_defaults(run=one)
    arguments = parser.parse_args(given)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
