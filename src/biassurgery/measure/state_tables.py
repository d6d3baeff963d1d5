"""`hidden_state_tables`: tables 1 and 2 of Sun et al. 2024 for a model, by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.layers import layer_indices
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.findings.finding import check_fits
from biassurgery.findings.hidden_state import (
    CarrierTable,
    HiddenStateTables,
    MagnitudeTable,
    VariationTable,
)
from biassurgery.findings.sites import Sites
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.magnitudes import Magnitudes
from biassurgery.measure.observe import observers
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.progress import count_of
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.state_sums import Held, PlaceSums, RankSums
from biassurgery.surgery.edit import attached


def hidden_state_tables(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    layer: int | None = None,
    *,
    tokenizer: Any = None,
    sites: Sites | None = None,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    progress: bool | None = None,
    tower: Tower | None = None,
) -> HiddenStateTables:
    """One block's output: its largest magnitudes, how values vary, and which tokens hold them.

    Tables 1 and 2 of Sun et al. 2024, for text and images, and their list of tokens (section 2.2).
    Sequences are read one by one, and sums are float64; memory is that of one sequence's state.
    Places are counted from the first real token of a row, and those that all sequences have are
    compared.

    Args:
        model: a model of a supported architecture.
        batches: see `detect`; padding is left out.
        layer: 0-based; None: that whose largest magnitude is the most medians in the first batch.
        tokenizer: the model's, for the texts of tokens; None: their ids. In images tokens go by
            their positions.
        sites: of this model, by `calibrate` or `detect`: the values beyond their gates are the
            massive ones. None: those that meet the definition by themselves, which leaves out the
            smaller ones of a channel whose values lie on both sides of it.
        min_magnitude, min_ratio: the definition of a massive activation, as in `detect`.
        progress: show a progress bar; None: only on a terminal.
        tower: `vision` (default) or `text`, of a model that has both.

    Raises:
        BadBatch, NonFiniteActivation: see their messages; the model is as it was.
        BadOption, LayerOutOfRange: thresholds, a tokenizer or a layer that cannot be used.
        Incompatible: the sites are of another model.
    """
    host = find_host(model, tower)
    check_measurable(host, min_magnitude, min_ratio)
    if sites is not None:
        check_fits("sites", sites.measured_on, host.facts, "calibrate on this model")
    given = as_batches(host, batches)
    first = next(given)
    if layer is None:
        layer = _most_prominent(host, first)
    else:
        layer = _only(layer_indices(host, layer), layer)
    text_of = _texts(host, first, tokenizer)
    gates = None if sites is None else _gates(sites, layer)
    tables = _Tables(host, layer, Held(min_magnitude, min_ratio, gates))
    with reading(host.model), attached(observers(host, tables.see, layers=[layer])):
        for batch in with_bar(chain([first], given), "hidden states", progress, count_of(batches)):
            host.adapter.run(host.model, batch)
            tables.add(batch)
    return tables.result(text_of)


def _gates(sites: Sites, layer: int) -> dict[int, float]:
    """The magnitude beyond which the values of each channel are massive."""
    gates: dict[int, float] = {}
    for site in sites.at(layer):
        gate = abs(site.mean) / 2 if site.gate is None else site.gate
        gates[site.channel] = min(gate, gates.get(site.channel, gate))
    return gates


def _only(layers: list[int], given: Any) -> int:
    if len(layers) != 1:
        raise BadOption(f"layer: {given!r}; give one index.")
    return layers[0]


def _most_prominent(host: Host, batch: dict[str, Any]) -> int:
    magnitudes = Magnitudes(host)
    Pass(host, 0.0, 0.0, [magnitudes]).read([batch], "choosing a block", progress=False)
    return max(magnitudes.result(), key=lambda row: row.ratio).layer


def _texts(host: Host, batch: Mapping[str, Any], tokenizer: Any) -> Callable[[int], str]:
    """From a token's id, or its place in an image, to what it is called."""
    if host.adapter.modality != "text":
        if tokenizer is not None:
            raise BadOption("tokenizer: this model reads no text; leave tokenizer= out.")
        return str
    if tokenizer is None:
        return str
    if not callable(getattr(tokenizer, "decode", None)):
        raise BadOption(
            f"tokenizer: a {type(tokenizer).__name__}; give one of transformers, such as"
            " AutoTokenizer.from_pretrained(name)."
        )
    return lambda token: tokenizer.decode([token])


class _Tables:
    """Sums over the sequences of one block's output."""

    def __init__(self, host: Host, layer: int, held: Held) -> None:
        self.host = host
        self.layer = layer
        self.ranks = RankSums()
        self.places = PlaceSums()
        self.held = held
        self._hidden: Tensor | None = None

    def see(self, layer: int, hidden: Tensor) -> None:
        self._hidden = hidden.detach()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count what has been seen of a batch."""
        for state, ids, roles in self._rows(batch):
            if not state.isfinite().all():
                raise NonFiniteActivation(
                    f"batches: the output of block {self.layer} holds NaN or infinity;"
                    f" {what_to_do(self.host)}."
                )
            self.ranks.add(state)
            self.places.add(state)
            self.held.add(state, ids, roles)
        self._hidden = None

    def _rows(self, batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The real tokens of each sequence: states (T, D), ids or places (T,), roles (T,)."""
        if self._hidden is None:
            raise UnsupportedModel(f"model: block {self.layer} did not run; choose another layer.")
        rows, tokens, _ = self._hidden.shape
        roles = self.host.adapter.token_roles(self.host.model, batch, (rows, tokens)).cpu()
        ids = batch.get("input_ids")
        places = torch.arange(tokens).expand(rows, -1)
        for hidden, row, names in zip(self._hidden, places if ids is None else ids.cpu(), roles):
            real = names != PADDING
            if real.any():
                yield hidden.cpu().double()[real], row[real], names[real]

    def result(self, text_of: Callable[[int], str]) -> HiddenStateTables:
        variation = None
        if self.places.sequences > 1:
            rows = self.held.rows(self.host.roles) + self.places.rows()
            variation = VariationTable(self.layer, rows)
        return HiddenStateTables(
            self.layer,
            self.places.sequences,
            MagnitudeTable(self.layer, self.ranks.rows()),
            variation,
            CarrierTable(self.layer, self.held.carriers(text_of)),
        )
