"""Static int8 by torchao, linear by linear: which layers, and how far each scale reaches.

torchao's `Int8StaticActivationInt8WeightConfig` has one activation scale for all layers that it is
given (pytorch/ao#3089); here each layer has a configuration of its own. torchao rounds and
multiplies; what this file adds are the numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.evaluate.language import perplexity
from biassurgery.integrations.torchao_linears import Layers
from biassurgery.measure.kept import rows_of
from biassurgery.measure.linear_quantiles import LinearQuantiles

QUANTILES = (1.0, 0.99999, 0.9999, 0.999)
_HELD = 4  # of so many batches one chooses the quantile


@dataclass(frozen=True)
class StaticInt8:
    """How a model was quantised.

    Attributes:
        quantile: share of the calibration magnitudes that the static scales hold.
        perplexities: by quantile, on the part of the calibration data that chose among them.
        scales: by name of the layers with a static scale, the magnitude that it reaches to.
        per_token: names of the layers that have one scale a token.
        ignored: names of the linear layers that were left in floating point.
        smooth: the strength of SmoothQuant; None: without.
    """

    quantile: float
    perplexities: Mapping[float, float]
    scales: Mapping[str, float]
    per_token: tuple[str, ...]
    ignored: tuple[str, ...]
    smooth: float | None


def quantize_static(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    ignore: Collection[str] = (),
    per_token: Collection[str] = (),
    smooth: float | None = None,
    quantiles: Collection[float] = QUANTILES,
    progress: bool | None = None,
) -> StaticInt8:
    """Quantise the linear layers in the blocks to static int8 with torchao, in place.

    Weights have one scale an output channel, activations one a layer, for all data. Three quarters
    of the batches set the scales: of each layer to a quantile of the magnitudes that it reads. The
    last quarter, which has set none, chooses the quantile, by the perplexity of the int8 model.

    Remedies go on first: `bs.patch_model(model, "pin", ...)`, or `"transplant"` with batches that
    have no start token.

    Args:
        model: a causal language model whose linear layers are `nn.Linear`; it is changed. In
            bfloat16 or float32.
        batches: calibration data, of two sequences or more, as for `diagnose`.
        ignore: names of linear layers that stay as they are: `Diagnosis.ignore()`.
        per_token: layers that get one dynamic scale a token: their names, or how these end, as
            `("down_proj",)`.
        smooth: strength of SmoothQuant (torchao's prototype), as 0.5; None: without.
        quantiles: to choose from; 1.0 is the largest magnitude.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        What was chosen, and on what grounds.

    Raises:
        MissingPackage: torchao is not installed, or older than 0.18.
        BadOption, BadBatch, UnsupportedModel, NonFiniteActivation: see their messages; the model
            is as it was.
    """
    host = find_host(model)
    shares = _checked(host, smooth, quantiles)
    layers = Layers.of(host, ignore, per_token)
    calibration, held = _parts(host, batches, choose=len(shares) > 1)
    with layers.restored_on_error():
        if smooth is not None:
            layers.smooth(calibration, smooth)
        seen = LinearQuantiles(host, layers.static, layers.factors())
        with layers.in_floats():
            seen.read(calibration, "calibrating int8", progress)
        if smooth is None:
            layers.convert(seen.quantile(shares[0]), seen.axes())
        perplexities = {}
        for share in shares if held else ():
            layers.set_scales(seen.quantile(share), seen.axes())
            perplexities[share] = perplexity(model, held, progress=False)
        best = min(perplexities, key=perplexities.__getitem__, default=shares[0])
        layers.set_scales(seen.quantile(best), seen.axes())
    names = [[each.name for each in part] for part in (layers.per_token, layers.ignored)]
    return StaticInt8(
        best, perplexities, seen.quantile(best), tuple(names[0]), tuple(names[1]), smooth
    )


def _checked(host: Host, smooth: float | None, quantiles: Collection[float]) -> list[float]:
    """The quantiles, the largest first."""
    if smooth is not None and (
        isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0 < smooth < 1
    ):
        raise BadOption(f"smooth: {smooth!r}; give a number between 0 and 1, such as 0.5, or None.")
    given = [] if isinstance(quantiles, (str, float, int)) else list(quantiles)
    if not given or not all(isinstance(q, (int, float)) and 0.5 <= q <= 1 for q in given):
        raise BadOption(
            f"quantiles: {quantiles!r}; give one or more numbers from 0.5 to 1.0, as in (1.0,)."
        )
    if host.adapter.modality == "image" and len(given) > 1:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads images, and the quantile is chosen by the"
            " perplexity of text; give one, as in quantiles=(0.9999,)."
        )
    return sorted(set(given), reverse=True)


def _parts(
    host: Host, batches: Batch | Iterable[Batch], choose: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The batches that set the scales, and those that choose the quantile."""
    every = list(as_batches(host, batches))
    if not choose:
        return every, []
    if len(every) == 1:
        (batch,) = every
        main = batch.get("input_ids", batch.get("inputs_embeds"))
        rows = 0 if main is None else len(main)
        every = [rows_of(batch, [row]) for row in range(rows)]
    if len(every) < 2:
        raise BadBatch(
            "batches: there is one sequence, and what sets the scales must not choose how far they"
            " reach; give more, or one quantile."
        )
    held = every[_HELD - 1 :: _HELD] or every[-1:]
    return [batch for batch in every if not any(batch is other for other in held)], held
