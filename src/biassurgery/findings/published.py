"""Sites that others have measured on public checkpoints, as packaged data.

Source: Owen et al., "A Refined Analysis of Massive Activations in LLMs" (arXiv 2503.22329), result
logs of 18 checkpoints with and without BOS. Their intervention, and so these sites, are at ONE
layer each, the first or nearly the first with massive activations, so `layers="all"` means that
layer. `sun_2024` has the constants and perplexities of Sun et al. 2024.

The value of a site is the constant that the published run wrote, of several the one nearest to what
it found there (LLaMA-2-7B without BOS, channel 2533: 769 at the start, 2405 elsewhere); std and
count are of what it found. Left out, and kept in `left_out`:

- values whose observed mean has the other sign or less than half the magnitude: what that run wrote
  was measured at another layer (falcon-11B with BOS: channel 1926 in both roles, 3621 and 3830 at
  the start);
- values of at most 100, which are not massive by the run's own definition: it wrote them because
  the channel is massive at other tokens. A gate low enough for them would catch ordinary values,
  for without the data there is no gap to put it into (LLaMA-2-7B channel 1512 at the start, Mistral
  3398, falcon-7b 2242 elsewhere, phi-4 3693 at the start and 4532 elsewhere, and a few more).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from biassurgery.errors import CalibrationRequired
from biassurgery.findings.site import Site, Span

_ALIASES = {"gpt2": "openai-community/gpt2"}


@dataclass(frozen=True)
class PublishedSite:
    """One value of a published run: what it wrote (`value`) and what it had found there."""

    layer: int
    channel: int
    role: str
    value: float
    observed_mean: float
    observed_std: float
    observed_count: int


@dataclass(frozen=True)
class PublishedRun:
    """What was published of one checkpoint under one BOS policy.

    Attributes:
        checkpoint: its name on the Hugging Face hub.
        architecture: `config.model_type`; None where the checkpoint loads as either of two.
        bos: whether BOS was prepended; `bos_by_default`: whether the checkpoint's own tokenizer
            does so.
        context_length: tokens a sequence; `dtype`: of the model.
        layers: 0-based blocks with massive activations at their output.
        perplexity: `original`, `set_to_zero`, `set_to_mean_<layer>` -> `wikitext`, `c4`, `pg19` ->
            perplexity.
        sites: what `Sites.published` returns; `left_out`: what it does not, for the reasons above.
    """

    checkpoint: str
    architecture: str | None
    bos: bool
    bos_by_default: bool
    context_length: int
    dtype: str
    layers: tuple[int, ...]
    perplexity: dict[str, dict[str, float]]
    sites: tuple[PublishedSite, ...]
    left_out: tuple[PublishedSite, ...]

    @property
    def citation(self) -> str:
        """Where it is from and how it was measured."""
        layers = (
            f"layer {self.layers[0]} to {self.layers[-1]} massive"
            if self.layers
            else "no massive activations found"
        )
        return (
            f"Owen et al., arXiv 2503.22329, {self.checkpoint} {'with' if self.bos else 'without'}"
            f" BOS, {self.context_length} tokens, {self.dtype}, {layers}"
        )


def published_run(name: str, bos: bool | None = None) -> PublishedRun:
    """What is published of a checkpoint; `name` in any case, `bos` None: as its tokenizer does.

    Raises:
        CalibrationRequired: nothing is published for this name.
    """
    runs = [run for run in published_runs() if run.checkpoint.lower() == _canonical(name)]
    if not runs:
        known = ", ".join(published_names())
        raise CalibrationRequired(
            f"name: nothing is published for {name!r}. Measure it: sites = calibrate(model,"
            f" batches). Published are: {known}."
        )
    return next(run for run in runs if run.bos == (run.bos_by_default if bos is None else bos))


def published_names() -> tuple[str, ...]:
    """Names of the checkpoints with published runs."""
    return tuple(dict.fromkeys(run.checkpoint for run in published_runs()))


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Every published run, two a checkpoint: facts for documentation and comparison."""
    return tuple(
        PublishedRun(
            **{
                **run,
                "layers": tuple(run["layers"]),
                **{
                    part: tuple(PublishedSite(*row) for row in run[part])
                    for part in ("sites", "left_out")
                },
            }
        )
        for run in _read()["runs"]
    )


def sun_2024() -> dict[str, Any]:
    """Constants and intervention perplexities of Sun et al. 2024 for LLaMA-2-7B and 13B.

    Their source stands with them.
    """
    return _read()["sun_2024"]


def is_published(name: str) -> bool:
    """Whether there are published runs of this name."""
    return _canonical(name) in {run.checkpoint.lower() for run in published_runs()}


def _canonical(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _read() -> dict[str, Any]:
    return json.loads(
        files("biassurgery").joinpath("assets/published_sites.json").read_text(encoding="utf-8")
    )


def sites_of(run: PublishedRun) -> list[Site]:
    """The sites of a run, each with all levels of its channel: what is filtered out stays."""
    channels: dict[tuple[int, int], list[Span]] = {}
    clusters = []
    for site in run.sites:
        spans = channels.setdefault((site.layer, site.channel), [])
        clusters.append(sum(span.role == site.role for span in spans))
        spans.append(Span(site.role, clusters[-1], site.value, site.value))
    return [
        Site(
            site.layer,
            site.channel,
            site.role,
            site.value,
            site.observed_std,
            site.observed_count,
            cluster=cluster,
            spans=tuple(channels[site.layer, site.channel]),
        )
        for site, cluster in zip(run.sites, clusters)
    ]
