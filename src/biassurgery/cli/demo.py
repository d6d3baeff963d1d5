"""The paper's central result on the packaged checkpoint: find, remove, fix, miss.

Massive activations are found, then set to zero, set to their mean, and other values set to zero.
The checkpoint is a LLaMA of under a million parameters that this project trained on public-domain
English (`training/`); nothing in it is planted. Being small, it does not reach the paper's ratio of
1000, so the demo states its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import nn

from biassurgery.cli.measures import perplexity_and_loss
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.evaluate import Comparison, compare
from biassurgery.findings.detection import Detection
from biassurgery.measure.detect import detect

MIN_MAGNITUDE = 100.0
MIN_RATIO = 100.0
MODES = (None, "set_zero", "set_mean", "zero_random")


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        about: the model, the data and the definition, in words.
        detection: magnitudes per layer and the sites, on the calibration text.
        comparison: loss and perplexity under each intervention, on the evaluation text.
    """

    about: str
    detection: Detection
    comparison: Comparison


def run_demo() -> Demo:
    """Detect and calibrate on one packaged text, evaluate on the other; seconds on one core."""
    model, tokenizer = load_demo_model()
    length = model.config.max_position_embeddings
    calibration, evaluation = (
        text_batches(tokenizer, packaged_text(name), length)
        for name in ("calibration", "evaluation")
    )
    detection = detect(
        model,
        calibration,
        min_magnitude=MIN_MAGNITUDE,
        min_ratio=MIN_RATIO,
        source="the packaged calibration text",
    )

    def evaluate(host: nn.Module) -> dict[str, float]:
        return perplexity_and_loss(host, evaluation)

    parameters = sum(p.numel() for p in model.parameters())
    born = sorted({site.layer for site in detection.sites if site.first})
    about = (
        f"model: the packaged checkpoint, a LLaMA of {parameters:,} parameters trained by this"
        " project; nothing in it is planted\ndata: packaged public-domain English, windows of"
        f" {length} tokens, each behind the start token {tokenizer.bos_token}; calibrated on one"
        f" text, evaluated on another\ndefinition: magnitude above {MIN_MAGNITUDE:g} and above"
        f" {MIN_RATIO:g} x the median of its sequence (Sun et al. 2024: 100 and 1000; a model this"
        " small does not reach their ratio)\ninterventions: at the output of block"
        f" {', '.join(map(str, born))}, where massive activations are born\n"
    )
    return Demo(about, detection, compare(model, evaluate, MODES, sites=detection.sites))


def load_demo_model() -> tuple[Any, Any]:
    """The packaged checkpoint, float32 on the CPU, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with as_file(files("biassurgery") / "assets" / "demo") as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)
