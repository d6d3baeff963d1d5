"""What `distill_sinks.py` reads and measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from biassurgery.data.windows import tokenize
from biassurgery.measure.sink_logits import fit_sink_logits

AT_A_TIME = 4  # sequences a forward


def windows(
    tokenizer: Any, path: str | None, packaged: Literal["calibration", "evaluation"]
) -> Tensor:
    """(N,) int64: the tokens of a text file, or of a packaged text."""
    text = packaged_text(packaged) if path is None else Path(path).read_text(encoding="utf-8")
    return tokenize(tokenizer, text)


def evaluate(model: Any, held: Tensor, start: int | None = None) -> dict[str, float]:
    """Of held-out sequences (B, T), read behind `start` or as they are.

    Returns:
        `perplexity`; `evicted`, the same under a sliding window of a quarter of a sequence, over
        the tokens behind it, so that whatever comes first has left the cache; `largest`, the
        largest magnitude in the residual stream.
    """
    parts = list(held.split(AT_A_TIME))
    return {
        "perplexity": bs.perplexity(model, parts, start=start, progress=False),
        "evicted": sliding(model, held, start),
        "largest": largest(model, parts[0], start),
    }


@torch.no_grad()
def sliding(model: Any, held: Tensor, start: int | None) -> float:
    """Perplexity of the tokens that only see a quarter of a sequence, not its first tokens."""
    window = held.shape[1] // 4
    ids = held if start is None else nn.functional.pad(held, (1, 0), value=start)
    length = ids.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    scored = held.shape[1] - window - 1  # the same tokens with and without a start token
    losses = []
    for part in ids.split(AT_A_TIME):
        logits = model(
            input_ids=part,
            attention_mask=mask.expand(len(part), 1, -1, -1).to(part.device),
            position_ids=torch.arange(length, device=part.device).expand(len(part), -1),
            use_cache=False,
        ).logits
        behind = logits[:, -scored - 1 : -1].float().flatten(0, 1)
        losses.append(cross_entropy(behind, part[:, -scored:].flatten()))
    return torch.stack(losses).mean().exp().item()


@torch.no_grad()
def largest(model: Any, ids: Tensor, start: int | None) -> float:
    """The largest magnitude at any block's output."""
    read = ids if start is None else nn.functional.pad(ids, (1, 0), value=start)
    with bs.record(model, "block_output") as seen:
        model(input_ids=read, use_cache=False)
    return max(hidden.abs().max().item() for hidden in seen["block_output"].values())


def begin(folder: Path, teacher: Any, calibration: Tensor, held: Tensor, start: int) -> Tensor:
    """Write `baselines.json`: the teacher, with and without its start token, and that transplanted.

    Returns:
        (layers, heads): the logits that the start token's key is worth, on average.
    """
    found = {
        "with the start token": evaluate(teacher, held, start),
        "without it": evaluate(teacher, held),
    }
    key_values = bs.calibrate_key_values(teacher, calibration, start=start, progress=False)
    with bs.patched(teacher, "transplant", key_values=key_values):
        found["its exact k', v' (transplant)"] = evaluate(teacher, held)
        fitted = fit_sink_logits(teacher, calibration)
    (folder / "baselines.json").write_text(json.dumps(found, indent=1) + "\n")
    return fitted
