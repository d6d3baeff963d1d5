"""Perplexities under fake int8, as a model is and under each remedy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.linears import Linear, linears, weights_of
from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import IGNORED, Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.edits.fake_quantised import Activations, FakeQuantised
from biassurgery.errors import BadOption, NonFiniteActivation, NoSites, UnsupportedModel
from biassurgery.evaluate.language import perplexity
from biassurgery.findings.diagnosed import Measured
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.sites import Sites
from biassurgery.measure.diagnose import diagnosed
from biassurgery.measure.key_values import calibrate_key_values
from biassurgery.patching import patched
from biassurgery.surgery.edit import Place, attached

QUANTISATIONS: dict[str, Activations | None] = {
    "float": None,
    "weights": "exact",
    "static": "static",
    "dynamic per tensor": "tensor",
    "dynamic per token": "token",
}


@contextmanager
def fake_quantised(
    model: nn.Module,
    activations: Activations,
    *,
    largest: Mapping[str, float] | None = None,
    ignore: Collection[str] = (),
    per_token: Collection[str] = (),
    bits: int = 8,
    group: int | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Within the block every linear layer in the blocks computes as with int8, but in floats.

    Weights have one scale an output channel. No parameter is changed; a rounded copy of the weights
    is held meanwhile.

    Args:
        model: of a supported architecture.
        activations: `exact` (weights only), `static` (one scale for all data), `tensor` (one a
            forward) or `token` (one a token).
        largest: for `static`, by the layer's name the magnitude that its scale reaches to.
        ignore: names of layers that stay as they are.
        per_token: names of layers that have one scale a token, whatever the others have.
        bits: of the weights, from 2 to 8.
        group: weights have one scale for so many inputs of an output; None: one an output.
        factors: by name (D,) that the inputs are multiplied by, and the weights divided, before
            they are rounded, as SmoothQuant does. `largest` is of the products.

    Raises:
        BadOption: a name that is no linear layer of the model's blocks, or no range for one; a
            group that does not divide the inputs of a layer.
        UnsupportedModel: weights that are packed, or blocks without linear layers.
    """
    if bits not in range(2, 9):
        raise BadOption(f"bits: {bits!r}; give a number of bits from 2 to 8.")
    host = find_host(model)
    kinds = _kinds(host, activations, largest or {}, set(ignore), set(per_token))
    scales = (largest or {}, factors or {})
    with attached([_place(linear, kind, *scales, bits, group) for linear, kind in kinds]):
        yield model


def _kinds(
    host: Host,
    activations: Activations,
    largest: Mapping[str, float],
    ignore: set[str],
    per_token: set[str],
) -> list[tuple[Linear, Activations]]:
    """The layers that are rounded, and how their inputs are; refuses names that are none."""
    every = linears(host)
    unknown = sorted((ignore | per_token) - {linear.name for linear in every})
    if unknown:
        raise BadOption(
            f"ignore, per_token: {unknown[0]!r} is no linear layer of the blocks of"
            f" {type(host.model).__name__}; the names are those of model.named_modules()."
        )
    found: list[tuple[Linear, Activations]] = []
    for linear in every:
        kind: Activations = "token" if linear.name in per_token else activations
        if linear.name in ignore:
            continue
        if kind == "static" and linear.name not in largest:
            raise BadOption(
                f"largest: nothing is known of {linear.name}; measure its range with diagnose(), or"
                " ignore it."
            )
        found.append((linear, kind))
    return found


def _place(
    linear: Linear,
    kind: Activations,
    largest: Mapping[str, float],
    factors: Mapping[str, Tensor],
    bits: int,
    group: int | None,
) -> Place:
    name = linear.name
    weights = weights_of(linear.module)
    if weights is None:
        raise UnsupportedModel(
            f"model: the weights of {name} are packed, so the model is quantised already;"
            " pass the one before."
        )
    if group is not None and (group < 1 or weights.shape[1] % group):
        raise BadOption(
            f"group: {group!r} does not divide the {weights.shape[1]} inputs of {name}; give a"
            " number that divides those of every layer, or None."
        )
    bias: Any = getattr(linear.module, "bias", None)
    reach = largest.get(name)
    edit = FakeQuantised(weights, bias, kind, reach, bits, group, factors.get(name))
    return Place(linear.layer, linear.module, edit)


def measured(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    found: Diagnosis,
    *,
    start: Start = None,
    tokenizer: Any = None,
) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """The perplexity under each quantisation and remedy, on batches that can be read again.

    Every cell scores the same tokens: the first of a sequence, and the one behind it, are left out,
    for `transplant` has no start token to predict that from. Static scales reach to the largest
    magnitude in the batches themselves; with `pin`, to that of tokens without massive activations,
    for what clips is written back.

    Returns:
        The cells, and why a remedy has none.

    Raises:
        BadOption: the batches can be read once only.
        UnsupportedModel: not a language model.
    """
    check_again(batches)
    host = find_host(model)
    given = behind_start(host, as_batches(host, batches), start_id(host, start, tokenizer))
    scored = [_scored(batch) for batch in given]
    whole = {row.name: row.largest for row in found.linears}
    unknown = {linear.name for linear in linears(host)} - set(whole)
    rows = [*_cells(model, scored, "as it is", whole, unknown)]
    notes = []
    if unknown or found.not_told:
        left = sorted(unknown.union(found.not_told))
        notes.append(f"measured: {len(left)} layers without a range are not rounded, as {left[0]}")
    ruled = set(found.ignore())
    if ruled:
        rows += _cells(model, scored, "ignore", whole, ruled | unknown)
        starts = [site for site in found.sites if site.role == "start"]
        ordinary = {row.name: row.ordinary for row in found.linears}
        try:
            with patched(model, "pin", sites=Sites(starts, origin=found.sites.origin)):
                rows += _cells(model, scored, "pin", ordinary, unknown)
        except (BadOption, NoSites, UnsupportedModel) as error:
            notes.append(f"pin was not measured: {error}")
    return tuple(rows + _transplanted(model, scored, found)), tuple(notes)


def check_again(batches: Any) -> None:
    """Raise `BadOption` if batches can be read once only."""
    if isinstance(batches, Iterator):
        raise BadOption(
            f"batches: measure=True reads them several times, and a {type(batches).__name__} can be"
            " read once; give a list."
        )


def _transplanted(
    model: nn.Module, scored: list[dict[str, Any]], found: Diagnosis
) -> list[Measured]:
    """The cells of `transplant`, where every sequence begins with the same token."""
    ids = [batch.get("input_ids") for batch in scored]
    starts = {int(word) for tokens in ids if tokens is not None for word in tokens[:, 0]}
    plain = all(set(batch) == {"input_ids", "labels"} for batch in scored)
    if not len(found.sites) or not plain or len(starts) != 1:
        return []
    key_values = calibrate_key_values(
        model, [{"input_ids": batch["input_ids"]} for batch in scored]
    )
    without = [{name: value[:, 1:] for name, value in batch.items()} for batch in scored]
    with patched(model, "transplant", key_values=key_values):
        ranges = diagnosed(model, [batch["input_ids"] for batch in without])
        largest = {row.name: row.largest for row in ranges.linears}
        unknown = {linear.name for linear in linears(find_host(model))} - set(largest)
        return _cells(model, without, "transplant", largest, unknown)


def _cells(
    model: nn.Module,
    batches: list[dict[str, Any]],
    remedy: str,
    largest: Mapping[str, float],
    ignore: Collection[str] = (),
) -> list[Measured]:
    rows = []
    for name, activations in QUANTISATIONS.items():
        rounded: Any = nullcontext()
        if activations is not None:
            rounded = fake_quantised(model, activations, largest=largest, ignore=ignore)
        with rounded:
            rows.append(Measured(name, remedy, _perplexity(model, batches)))
    return rows


def _perplexity(model: nn.Module, batches: list[dict[str, Any]]) -> float | None:
    try:
        value = perplexity(model, batches, progress=False)
    except NonFiniteActivation:
        return None
    return value if math.isfinite(value) else None


def _scored(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with labels: of all but padding, and the first two tokens of a row."""
    labels = batch.get("labels", batch.get("input_ids"))
    if not isinstance(labels, Tensor):
        raise UnsupportedModel(
            "model: measure=True takes the perplexity of text, and the batches do not say what is"
            " to be predicted; leave measure= out."
        )
    labels = labels.clone()
    mask = batch.get("attention_mask")
    real = torch.ones_like(labels) if mask is None else mask[:, -labels.shape[1] :]
    labels[real.cumsum(1) < 3] = IGNORED
    return {**batch, "labels": labels}
