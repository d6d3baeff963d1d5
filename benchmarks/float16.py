"""Perplexity of saved models in float16 and float32 by stock transformers: what is still finite?

    python benchmarks/float16.py MODEL RESCALED --text wiki.test.raw --keep float16.json

The first folder has the tokenizer. Windows are kept as they are
scored, so that the same command goes on where it was. This library is never imported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

Losses = dict[str, list[float]]


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    rows = windows(options)
    file = Path(options.keep)
    about = {"text": Path(options.text).name, "length": options.length, "start": options.start}
    kept: dict[str, Any] = {"about": about, "losses": {}}
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["about"] != about:
            raise SystemExit(f"{file} is of {kept['about']}; give another --keep")
    for folder in options.folders:
        for dtype in options.dtypes:
            found = kept["losses"].setdefault(f"{folder} | {dtype}", [])
            if len(found) >= len(rows):
                continue
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            model = model.to(options.device).eval()
            for row in rows[len(found) :]:
                found.append(loss_of(model, row.to(options.device)))
                write(file, kept)
    sys.stdout.write(table(kept["losses"], options.folders, options.dtypes) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="of save_pretrained; the first as it is")
    parser.add_argument("--text", required=True, help="UTF-8, such as the test split of WikiText-2")
    parser.add_argument("--keep", default="float16.json", help="where losses are kept")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--start", help="the token in front; without it, the tokenizer's BOS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    return parser.parse_args()


def windows(options: argparse.Namespace) -> list[Tensor]:
    """Rows (1, T) that follow each other in the text, with the start token in front."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folders[0])
    start = options.start or tokenizer.bos_token
    if start is None:
        raise SystemExit("the tokenizer has no BOS; name a token to put in front by --start")
    front = tokenizer.convert_tokens_to_ids(start)
    text = Path(options.text).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = options.length - 1
    if len(ids) < step * options.windows:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for {options.windows} windows")
    return [
        torch.tensor([[front, *ids[step * i : step * (i + 1)]]]) for i in range(options.windows)
    ]


def loss_of(model: Any, row: Tensor) -> float:
    """Nats a token, from logits in the model's dtype."""
    with torch.no_grad():
        logits = model(input_ids=row).logits.float()
    return F.cross_entropy(logits[0, :-1], row[0, 1:]).item()


def write(file: Path, kept: dict[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(kept))
    part.replace(file)


def table(losses: Losses, folders: list[str], dtypes: list[str]) -> str:
    """Markdown: windows that are finite, perplexity over those, and how much more than that of the
    first row, over the windows that are finite in both.
    """
    lines = ["| checkpoint | dtype | finite windows | perplexity | to the first row |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    plain = losses[f"{folders[0]} | {dtypes[0]}"]
    for folder in folders:
        for dtype in dtypes:
            found = losses[f"{folder} | {dtype}"]
            finite = [value for value in found if math.isfinite(value)]
            differences = [a - b for a, b in zip(found, plain) if math.isfinite(a - b)]
            shown = f"{math.exp(mean(finite)):.5f}" if finite else "NaN"
            more = f"{math.expm1(mean(differences)):+.4%}" if differences else ""
            name = Path(folder).name
            lines.append(f"| {name} | {dtype} | {len(finite)} of {len(found)} | {shown} | {more} |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
