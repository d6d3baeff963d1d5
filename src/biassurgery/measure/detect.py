"""`detect`: what a model's hidden states look like, massive activations or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.findings.detection import Detection, roles_of
from biassurgery.kinds import names_in
from biassurgery.measure.by_blocks import Onload, by_blocks
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.confirm import confirm
from biassurgery.measure.magnitudes import Magnitudes
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.massive_tokens import MassiveTokens
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.outliers import OutlierFeatures
from biassurgery.measure.positions import PatchGrid, Positions
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.sinks import SinkStatistic, reason_against
from biassurgery.measure.statistic import STATISTICS, Statistic, add_up
from biassurgery.measure.uniform import UniformChannels


def detect(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    statistics: str | Sequence[str] = (),
    start: Start = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    onload: Onload = None,
    spill: str | Path | None = None,
    source: str = "",
    progress: bool | None = None,
    tower: Tower | None = None,
    group: Group = None,
) -> Detection:
    """Look for massive activations, outlier features and attention sinks in one pass over data.

    Under `torch.distributed` every rank reads its own batches and all report on the sum. Sinks are
    measured where attention can be led through this library's core, which a run of the first
    sequence tells; hidden states then equal those of an attention that is not fused up to rounding.

    An outlier feature is a channel with magnitude above 6.0 in more than 25 % of layers and, there,
    at more than 6 % of tokens, on more than 90 % of sequences (Dettmers et al. 2022, as used by Sun
    et al. 2024, section 2).

    Args:
        model: a model of a supported architecture.
        batches: tensors (`input_ids` (B, T) int64 or `pixel_values` (B, C, H, W)), dicts of the
            model's arguments, or pairs with labels; padding is recognised by `attention_mask` (B,
            T).
        min_magnitude, min_ratio: a value is massive if its magnitude is above the one, and above
            the other times the median magnitude of its sequence (Sun et al. 2024, section 2).
        statistics: names of further statistics to count in the same pass, also of other packages
            (subclasses of `biassurgery.extend.Statistic`); what they find is in
            `Detection.statistics`.
        start: a token to put in front of every sequence, see `calibrate`.
        tokenizer: the model's, for the texts of the tokens that massive activations are on, in
            `.roles` and `.positions`, and where `start` is a token; None: they are not counted.
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        onload, spill: for a model larger than memory, see `calibrate`.
        source: what the data are, kept with the sites.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        tower: `vision` (default) or `text`, of a model that has both.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch, NonFiniteActivation: see their messages; the model is as it was.
        BadOption: thresholds that cannot be used, a tokenizer for images, or a statistic that is
            not known, or whose counts of several ranks do not add up, or cannot be kept in a
            checkpoint.
        FileError: `checkpoint` cannot be used, or is of another pass.
        UnsupportedModel: also if `sinks` are asked for by name, but cannot be measured.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("detect", model, group) as ranks:
        host = find_host(model, tower)
        check_measurable(host, min_magnitude, min_ratio)
        names = _known(statistics)
        front = start_id(host, start, tokenizer)
        ranks.same(min_magnitude=min_magnitude, min_ratio=min_ratio, statistics=names, start=front)
        blocks = by_blocks(host, onload, spill, checkpoint)
        checked = ranks.apart(behind_start(host, as_batches(host, batches), front))
        first = next(checked)
        no_sinks = next(filter(None, ranks.total([reason_against(host, first)])), "")
        _check_measurable_here(names, no_sinks, tokenizer)
        massive = MassiveActivations(host, min_magnitude, min_ratio, source, front)
        own = _Own.of(host, massive)
        sinks = None if no_sinks else SinkStatistic(host, own.candidates)
        words = None if tokenizer is None else MassiveTokens(host, own.candidates, tokenizer)
        by_name = _by_name(host, (*own, sinks, words), names)
        one_pass = Pass(host, min_magnitude, min_ratio, list(by_name.values()))
        checked = chain([first], checked)
        one_pass.read(checked, "detecting", progress, checkpoint, batches, front, blocks)
        one_pass.warn_of_left_out()
        confirm(host, massive)
        add_up(ranks, list(by_name.values()))
    return _detection(own, sinks, no_sinks, words, [by_name[name] for name in names])


def _known(statistics: str | Sequence[str]) -> list[str]:
    """The names of statistics, each of which there is."""
    asked = names_in("statistics", statistics, STATISTICS)
    return [STATISTICS.find(name).name for name in asked]


def _check_measurable_here(names: Sequence[str], no_sinks: str, tokenizer: Any) -> None:
    """Refuse statistics of ours that are asked for by name, but cannot be measured."""
    if no_sinks and SinkStatistic.name in names:
        raise UnsupportedModel(no_sinks)
    if tokenizer is None and MassiveTokens.name in names:
        raise BadOption(
            f"statistics: {MassiveTokens.name!r} needs a tokenizer; give tokenizer= as well."
        )


class _Own(NamedTuple):
    """The statistics that every detection has, whatever the model."""

    massive: MassiveActivations
    magnitudes: Magnitudes
    outliers: OutlierFeatures
    uniform: UniformChannels
    positions: Positions
    grid: PatchGrid

    @classmethod
    def of(cls, host: Host, massive: MassiveActivations) -> _Own:
        return cls(
            massive,
            Magnitudes(host),
            OutlierFeatures(host),
            UniformChannels(host),
            Positions(host, Candidates(massive)),
            PatchGrid(host),
        )

    @property
    def candidates(self) -> Candidates:
        """What all of them take for massive until the end decides."""
        return self.positions.candidates


def _by_name(
    host: Host, counted: Sequence[Statistic | None], names: Sequence[str]
) -> dict[str, Statistic]:
    """The statistics of a pass: those that are there, and further ones of these names."""
    by_name = {statistic.name: statistic for statistic in counted if statistic is not None}
    return by_name | {name: STATISTICS.find(name)(host) for name in names if name not in by_name}


def _detection(
    own: _Own,
    sinks: SinkStatistic | None,
    no_sinks: str,
    words: MassiveTokens | None,
    further: Sequence[Statistic],
) -> Detection:
    sites = own.massive.result()
    grid = own.grid.result()
    positions = own.positions.result(grid)
    of_role = None
    if words is not None:
        found = words.result()
        of_role = found.of_role
        positions = tuple(
            replace(one, words=found.of_position[one.layer, one.position]) for one in positions
        )
    return Detection(
        sites=sites,
        layers=own.magnitudes.result(),
        roles=roles_of(sites, own.positions.tokens_by_role(), of_role),
        positions=positions,
        outlier_features=own.outliers.result(),
        sequences=own.massive.totals.sequences,
        tokens=own.massive.totals.tokens,
        sinks=None if sinks is None else sinks.result(),
        no_sinks=no_sinks,
        uniform_channels=own.uniform.result(sites.widespread()),
        grid=grid,
        statistics={statistic.name: statistic.result() for statistic in further},
        not_placed=sum(site.count for site in sites) - sum(p.count for p in positions),
    )
