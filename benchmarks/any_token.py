#!/usr/bin/env python3
"""Massive activations of any token in front: for how much of the vocabulary, and how large.

    python benchmarks/any_token.py smollm2
    python benchmarks/any_token.py gemma3 --sample 20000 --layer 5

Source: Sun, Canziani, LeCun, Zhu 2026, table 2. Each token stands alone in a sequence, which runs
up to the block where the value is born. The model is a folder or one that `biassurgery fetch` got.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.packaged import packaged_text, special_prefix, text_batches
from biassurgery.data.real_models import REAL_MODELS, model_folder
from biassurgery.measure.alone import values_alone

say = partial(Console().print, markup=False, highlight=False, soft_wrap=True)
LENGTH = 256
WINDOWS = 8
QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 1.0)


def examine(model: Any, tokenizer: Any, sample: int | None, layer: int | None) -> dict[str, Any]:
    """Magnitudes of tokens alone, beside what calibration finds in ordinary sequences."""
    text = torch.cat(text_batches(tokenizer, packaged_text("calibration"), LENGTH))[:WINDOWS]
    detection = bs.detect(model, text.split(4))
    start = [site for site in detection.sites if site.role == "start"]
    channel = max(start, key=lambda site: abs(site.mean)).channel
    born = min(site.layer for site in start if site.channel == channel and site.first)
    layer = born if layer is None else layer
    median = detection.layers[layer].median
    threshold = max(100.0, 1000.0 * median)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(size)
    if sample is not None and sample < size:
        ids = (
            torch.randperm(size, generator=torch.Generator().manual_seed(0))[:sample].sort().values
        )
    begin = time.perf_counter()
    magnitudes = values_alone(model, ids, layer, channel).abs()
    levels = [site.mean for site in start if (site.layer, site.channel) == (layer, channel)]
    bos = special_prefix(tokenizer) or [tokenizer.bos_token_id]
    lowest = ids[magnitudes.argsort()[:5]].tolist()
    return {
        "layer": layer,
        "channel": channel,
        "tokens": len(ids),
        "vocabulary": size,
        "median": median,
        "threshold": threshold,
        "without": int((magnitudes <= threshold).sum()),
        "quantiles": {str(q): magnitudes.double().quantile(q).item() for q in QUANTILES},
        "calibrated": levels,
        "bos": {
            tokenizer.decode(bos): values_alone(model, torch.tensor(bos[:1]), layer, channel)
            .abs()
            .item()
        },
        "lowest": {tokenizer.decode([token]): token for token in lowest},
        "seconds": time.perf_counter() - begin,
    }


def show(name: str, found: dict[str, Any]) -> None:
    say(f"{name}: block {found['layer']}, channel {found['channel']}")
    share = 100 * (1 - found["without"] / found["tokens"])
    say(f"  tokens alone in a sequence: {found['tokens']:,} of {found['vocabulary']:,}")
    say(
        f"  beyond {found['threshold']:,.0f} (1000 x {found['median']:.3g}, the median of ordinary"
        f" sequences): {share:.2f} %, all but {found['without']:,}"
    )
    for quantile, magnitude in found["quantiles"].items():
        say(f"  quantile {quantile:>5}: {magnitude:10,.0f}")
    for token, magnitude in found["bos"].items():
        say(f"  {token}: {magnitude:,.0f}")
    means = ", ".join(f"{mean:,.0f}" for mean in found["calibrated"]) or "none here"
    say(f"  calibrated at the start token: {means}")
    say(f"  least: {', '.join(map(repr, found['lowest']))}")
    say(f"  {found['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="smollm2, gemma3, or a folder")
    parser.add_argument("--sample", type=int, help="so many tokens; default: the whole vocabulary")
    parser.add_argument("--layer", type=int, help="default: where the largest channel is born")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = REAL_MODELS.get(arguments.model)
    folder = model_folder(arguments.model) if known else arguments.model
    loaded = load_model(str(folder), dtype="float32")
    found = examine(loaded.model, loaded.tokenizer, arguments.sample, arguments.layer)
    show(f"{known.title}, {known.weights}" if known else arguments.model, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
