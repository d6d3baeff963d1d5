"""The paper's results on a real language model: its tables 1 to 3, who carries the values, sinks.

The model is one of `biassurgery.data.real_models`; its weights are dequantised GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.cli.demo import MODES
from biassurgery.cli.measures import perplexity_and_loss
from biassurgery.data.loading import Loaded, load_model
from biassurgery.data.packaged import packaged_text, special_prefix, text_batches
from biassurgery.data.real_models import RealModel
from biassurgery.evaluate import Comparison, compare
from biassurgery.findings.detection import Detection
from biassurgery.findings.hidden_state import CarrierTable, MagnitudeTable, VariationTable
from biassurgery.findings.render import table
from biassurgery.findings.sinks import LayerSinks
from biassurgery.measure.detect import detect
from biassurgery.measure.hidden_state import carrier_table, magnitude_table, variation_table
from biassurgery.measure.record import record

LENGTH = 256  # tokens a window
CALIBRATION = 16  # windows
EVALUATION = 8
_AROUND = 2  # blocks before and after the one where the values are born


@dataclass(frozen=True)
class RealDemo:
    """What the demo found.

    Attributes:
        about: the model, the data and the definition, in words.
        detection: on the calibration text.
        comparison: perplexity and loss of the evaluation text under each intervention.
        magnitudes, variation, carriers: of the block whose largest value is the most medians.
        sinks: of the blocks around the first one where that channel is massive.
    """

    about: str
    detection: Detection
    comparison: Comparison
    magnitudes: MagnitudeTable
    variation: VariationTable
    carriers: CarrierTable
    sinks: tuple[LayerSinks, ...]


def run_real_demo(
    known: RealModel, folder: Path, say: Callable[[str], None] = lambda _: None
) -> RealDemo:
    """Detect on one packaged text, compare on the other; a minute or two on two cores."""
    loaded = load_model(str(folder), dtype="float32")
    calibration = _windows(loaded, packaged_text("calibration"), CALIBRATION)
    evaluation = _windows(loaded, packaged_text("evaluation"), EVALUATION)
    say(f"reading {calibration.numel():,} tokens: magnitudes, massive activations, sinks")
    source = "the packaged calibration text"
    detection = detect(loaded.model, calibration.split(4), source=source)
    peak = max(detection.layers, key=lambda row: row.ratio).layer
    say(f"the hidden states at the output of block {peak}")
    hidden = _outputs(loaded.model, calibration, peak)
    comparison = _comparison(loaded.model, evaluation, detection, say)
    return RealDemo(
        _about(known, loaded, detection, evaluation),
        detection,
        comparison,
        magnitude_table(hidden, peak),
        variation_table(hidden, peak),
        carrier_table(hidden, calibration, peak, lambda token: loaded.tokenizer.decode([token])),
        _sinks_around(detection, peak),
    )


def _windows(loaded: Loaded, text: str, count: int) -> Tensor:
    return torch.cat(text_batches(loaded.tokenizer, text, LENGTH))[:count]


def _outputs(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """(N, T, D) on the CPU: a block's output for each window."""
    outputs = []
    for batch in ids.split(4):
        with torch.no_grad(), record(model, "block_output", [layer], device="cpu") as rec:
            model(batch.to(next(model.parameters()).device), use_cache=False)
        outputs.append(rec["block_output"][layer])
    return torch.cat(outputs)


def _comparison(
    model: nn.Module, evaluation: Tensor, detection: Detection, say: Callable[[str], None]
) -> Comparison:
    def evaluate(host: nn.Module) -> dict[str, float]:
        return perplexity_and_loss(host, evaluation.split(4))

    say(f"perplexity of {evaluation.numel():,} other tokens under {len(MODES)} interventions")
    return compare(model, evaluate, MODES, sites=detection.sites)


def _sinks_around(detection: Detection, peak: int) -> tuple[LayerSinks, ...]:
    """The sinks of the blocks before and after the one where the largest values are born."""
    if detection.sinks is None or not len(detection.sites):
        return ()
    largest = max(detection.sites.at(peak), key=lambda site: abs(site.mean), default=None)
    channel = None if largest is None else largest.channel
    born = min((site.layer for site in detection.sites if site.channel == channel), default=peak)
    return tuple(row for row in detection.sinks.layers if abs(row.layer - born) <= _AROUND)


def sinks_table(rows: tuple[LayerSinks, ...]) -> Any:
    """Attention on the start token by block; massive activations act from the next block on."""
    columns = ("block", "attention on the start token", "highest head", "heads with a sink there")
    lines = table("Attention sinks around the block where the values are born", *columns)
    for row in rows:
        mean = sum(row.attention) / len(row.attention)
        sink = sum(row.sink) / len(row.sink)
        shares = (f"{100 * share:.1f} %" for share in (mean, max(row.attention), sink))
        lines.add_row(str(row.layer), *shares)
    return lines


def _about(known: RealModel, loaded: Loaded, detection: Detection, evaluation: Tensor) -> str:
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    prefix = special_prefix(loaded.tokenizer)
    front = f"each behind {loaded.tokenizer.decode(prefix)}" if prefix else "no BOS in front"
    born = {site.layer: site.channel for site in detection.sites if site.first}
    places = ", ".join(map(str, sorted(born))) or "none"
    return (
        f"model: {known.title}, {parameters:,} parameters, {known.licence}; weights:"
        f" {known.weights}\ndata: packaged public-domain English, windows of {LENGTH} tokens,"
        f" {front}; {detection.sequences} windows calibrated on, {len(evaluation)} others"
        " evaluated\ndefinition: magnitude above 100 and above 1000 x the median of its sequence"
        f" (Sun et al. 2024)\ninterventions: at the output of block {places}, where massive"
        " activations are born or have grown\n"
    )
