"""`report`: what a model's massive activations are, do and break, on one page."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from biassurgery.adapters.registry import Host, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.errors import BadBatch, UnsupportedModel
from biassurgery.evaluate.diagnose import diagnose
from biassurgery.evaluate.interventions import compare
from biassurgery.evaluate.language import perplexity
from biassurgery.findings.detection import Detection
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.files import as_path, replacing
from biassurgery.measure.detect import detect
from biassurgery.reports import found as of
from biassurgery.reports.mechanism import mechanism_sections, state_sections
from biassurgery.reports.one import first_row, labels_of, outputs
from biassurgery.reports.page import load_packages, page
from biassurgery.reports.sample import sample_sections
from biassurgery.reports.section import Section

_MODES = (None, "set_zero", "set_mean", "zero_random")
_PACKAGES = ("biassurgery", "torch", "transformers", "timm")


def report(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    path: str | Path,
    *,
    tokenizer: Any = None,
    evaluation: Batch | Iterable[Batch] | None = None,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    start: Start = None,
    name: str = "",
    source: str = "",
    command: str = "",
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    progress: bool | None = None,
) -> Path:
    """Write one HTML page on a model: a verdict, then every table and figure it rests on.

    The page needs no network and no server. The data are read by `detect` and by `diagnose`,
    the first of them again for the figures of single sequences, and the model is as it was
    afterwards. Charts are Vega-Lite's, and the packages come with the extra `report`.

    Args:
        model: a model of a supported architecture.
        batches: data to find massive activations in, see `detect`; they can be iterated over more
            than once.
        path: of the page, replaced as a whole.
        tokenizer: the model's, for the text of tokens; None: their ids.
        evaluation: other data, for the intervention table; None: `batches` again, and the page says
            so.
        evaluate: called with the model, see `compare`; None: perplexity in text, and in images how
            far, in degrees, the model's output turns.
        start: a token to put in front of every sequence, see `calibrate`.
        name: of the model; empty: its class.
        source, command: what the data are, and how the report was asked for.
        min_magnitude, min_ratio: the definition of a massive activation, see `calibrate`.
        progress: show progress bars; None: only on a terminal.

    Raises:
        MissingPackage: jinja2 or vl-convert-python is not installed.
        FileError: the page cannot be written.
        BadBatch: the data can be read only once.
        BadOption, UnsupportedModel, NonFiniteActivation: see `detect` and `diagnose`.
    """
    target = as_path("path", path)
    load_packages()
    host = find_host(model)
    front = start_id(host, start, tokenizer)
    data = _data(host, batches, front)
    definition: dict[str, Any] = {"min_magnitude": min_magnitude, "min_ratio": min_ratio}
    shared = definition | {"tokenizer": tokenizer, "source": source, "progress": progress}
    found = detect(model, data, statistics="channels", **shared)
    diagnosis = diagnose(model, data, **shared)
    evaluate = evaluate or _evaluation(host, batches if evaluation is None else evaluation, front)
    needed = _interventions(model, found, evaluate, again=evaluation is None)
    shown = _sample(host, data, tokenizer, _born(found))
    shown += state_sections(host, data, found, tokenizer, definition)
    shown += mechanism_sections(host, data, found, diagnosis)
    text = page(
        name or type(host.model).__name__,
        diagnosis.verdict,
        diagnosis.advice,
        _sections(found, diagnosis, needed, shown),
        _made(host, found, source, command, definition),
    )
    return _write(target, text)


def _write(path: Path, text: str) -> Path:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def _data(host: Host, batches: Any, start: int | None) -> Any:
    """What is read, several times over."""
    if iter(batches) is batches:
        raise BadBatch(
            "batches: an iterator can be read only once, and a report reads them several times;"
            " give a list or a DataLoader."
        )
    if start is None:
        return batches
    return list(behind_start(host, as_batches(host, batches), start))


def _sample(host: Host, data: Any, tokenizer: Any, born: int) -> list[Section]:
    """What the first sequence shows."""
    one = first_row(host, next(as_batches(host, data)))
    return sample_sections(host, one, labels_of(host, one, tokenizer), born)


def _interventions(
    model: nn.Module,
    found: Detection,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]],
    *,
    again: bool,
) -> Section | None:
    """The table of interventions, or why there is none; None: nothing was found."""
    if not found.sites:
        return None
    try:
        table = compare(model, evaluate, _MODES, sites=found.sites)
    except UnsupportedModel as error:  # an encoder has no perplexity
        return Section("interventions", of.NEEDED, f"Not measured. {error}")
    return of.interventions(table, "the data that they were found in" if again else "other data")


def _sections(
    found: Detection,
    diagnosis: Diagnosis,
    needed: Section | None,
    shown: Sequence[Section],
) -> list[Section]:
    """All parts of the page in their order, without those that there is nothing for."""
    parts = [
        needed,
        of.magnitudes(found),
        *shown,
        of.sinks(found),
        of.linears(diagnosis),
        of.super_weights(diagnosis),
        of.sites(found.sites) if len(found.sites) else None,
    ]
    return [part for part in parts if part is not None]


def _evaluation(
    host: Host, data: Any, start: int | None
) -> Callable[[nn.Module], Mapping[str, float]]:
    """Perplexity of text, or how far the output of an image model turns, as numbers by name."""
    if host.adapter.modality == "text":
        return lambda model: {"perplexity": perplexity(model, data, start=start)}
    originals: list[Tensor] = []  # of the first call, which is that of the model as it is

    def turned(model: nn.Module) -> Mapping[str, float]:
        features = outputs(model, host, data)
        originals.append(features)
        cosine = cosine_similarity(features, originals[0], dim=-1)
        return {"degrees": cosine.clamp(-1, 1).arccos().rad2deg().mean().item()}

    return turned


def _born(found: Detection) -> int:
    """The first block with a site, or that with the largest value."""
    layers = [site.layer for site in found.sites if site.first]
    return min(layers, default=max(found.layers, key=lambda layer: layer.top[0]).layer)


def _made(
    host: Host, found: Detection, source: str, command: str, definition: Mapping[str, float]
) -> dict[str, str]:
    """How the report was made."""
    parameter = next(host.model.parameters())
    packages = {name: version(name) for name in _PACKAGES}
    return {
        "model": f"{type(host.model).__name__}, {len(host.blocks)} blocks of width {host.width},"
        f" {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}",
        "weights": str(getattr(getattr(host.model, "config", None), "_name_or_path", "") or "-"),
        "data": f"{source or 'given as batches'}; {found.sequences:,} sequences,"
        f" {found.tokens:,} tokens",
        "definition": f"magnitude above {definition['min_magnitude']:g} and above"
        f" {definition['min_ratio']:g} times the median of the hidden state",
        "command": command or "biassurgery.report(...)",
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items())
        + f", Python {platform.python_version()}",
        "seed": "none: nothing is drawn at random but the control's places, by a fixed seed",
        "made on": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
