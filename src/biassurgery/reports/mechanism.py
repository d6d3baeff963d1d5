"""Sections on one hidden state and on how it works: tables 1 and 2, channels, a value, sinks."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from biassurgery.adapters.registry import Host
from biassurgery.data.batches import as_batches
from biassurgery.errors import BadBatch, MissingPackage, UnsupportedModel
from biassurgery.findings.channels import ChannelTable
from biassurgery.findings.detection import Detection
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.hidden_state import HiddenStateTables
from biassurgery.findings.value_life import ValueLife
from biassurgery.measure.sink_kinds import sink_kinds
from biassurgery.measure.state_tables import hidden_state_tables
from biassurgery.measure.value_life import value_life
from biassurgery.plots.figures import readable
from biassurgery.plots.life import value_life as draw_life
from biassurgery.reports.charts import dots, points
from biassurgery.reports.section import Section, columns_of

_TABLES = 2048  # tokens, or some more, that the tables of one hidden state are of
_FOLLOWED = 1024  # by which a value is followed and sinks are told apart
_IMAGE = 64  # tokens that an image counts as
_SINKS = ("broadcast", "nop", "no sink", "mixed")  # in the order of colours
_TOKENS = 16  # that are drawn


def state_sections(
    host: Host, data: Any, found: Detection, tokenizer: Any, definition: Mapping[str, Any]
) -> list[Section]:
    """Tables 1 and 2 at the block whose largest magnitude is the most medians, and its tokens."""
    layer = max(found.layers, key=lambda row: row.ratio).layer
    first = _first(host, data, _TABLES)
    tables = hidden_state_tables(
        host.root,
        first,
        layer,
        tokenizer=tokenizer,
        sites=found.sites if found.sites else None,
        progress=False,
        **definition,
    )
    sections = [_ranks(tables), _variation(tables), _carriers(tables)]
    return [section for section in sections if section is not None]


def mechanism_sections(
    host: Host, data: Any, found: Detection, diagnosis: Diagnosis
) -> list[Section]:
    """Massive activations beside outlier features, the life of one, and what sinks send."""
    few = _first(host, data, _FOLLOWED)
    sections = [_channels(found.statistics["channels"])]
    if diagnosis.sites:
        sections += _life(host, few, diagnosis)
    return [*sections, *_sinks(host, few, found)]


def _first(host: Host, data: Any, tokens: int) -> list[dict[str, Any]]:
    """The first batches, of so many tokens or more together; an image counts as some."""
    chosen: list[dict[str, Any]] = []
    read = 0
    for batch in as_batches(host, data):
        chosen.append(batch)
        main = batch.get("input_ids", next(iter(batch.values())))
        read += main.shape[0] * (main.shape[1] if main.dim() == 2 else _IMAGE)
        if read >= tokens:
            break
    return chosen


def _ranks(tables: HiddenStateTables) -> Section:
    rows = [(row.rank, row.magnitude) for row in tables.magnitudes.rows]
    columns = columns_of(("rank", "magnitude"), rows)
    return Section(
        "ranks",
        f"The largest magnitudes at the output of block {tables.layer}",
        "Of all values of a sequence at the block where the largest is the most medians, by rank,"
        f" means over {tables.sequences:,} sequences, on a logarithmic scale.",
        columns,
        dots("magnitude", "rank", ("rank", "magnitude"), rows=len(rows)),
        alt=f"Dots: the largest magnitude is {rows[0][1]:,.0f}, the median {rows[-1][1]:.3g}.",
        source="Sun et al. 2024, table 1.",
    )


def _variation(tables: HiddenStateTables) -> Section | None:
    if tables.variation is None:
        return None
    names = ("place", "spread", "mean", "standard deviation", "variance", "channel", "token")
    rows = []
    for row in tables.variation.rows:
        place = f"{row.rank}: channel {row.channel}"
        place += "" if row.token is None else f", token {row.token}"
        spread = row.spread if row.mean else None
        numbers = (spread, row.mean, row.variance**0.5, row.variance)
        rows.append((place, *numbers, row.channel, row.token))
    logarithmic = all(row[1] for row in rows)
    return Section(
        "variation",
        "How much they vary",
        "Massive activations over sequences, and other places of the same hidden state: the"
        " standard deviation over the magnitude of the mean. What hardly varies is a bias.",
        columns_of(names, rows),
        dots("spread", "place", names[:4], rows=len(rows), log=logarithmic),
        alt=f"Dots: {rows[0][0]} has a spread of {rows[0][1] or 0:.3g} of its mean.",
        source="Sun et al. 2024, table 2.",
    )


def _carriers(tables: HiddenStateTables) -> Section | None:
    if not tables.carriers.rows:
        return None
    names = ("token", "magnitude", "mean", "times", "channel", "id", "first at", "last at")
    rows = [
        (
            f"{readable(row.text)} (channel {row.channel})",
            abs(row.mean),
            row.mean,
            row.count,
            row.channel,
            row.token_id,
            *row.positions,
        )
        for row in tables.carriers.rows
    ]
    chart = dots("magnitude", "token", names[:5], rows=min(len(rows), _TOKENS))
    kept = [row[0] for row in rows[:_TOKENS]]
    chart["transform"] = [{"filter": {"field": "token", "oneOf": kept}}]
    return Section(
        "carriers",
        "Whose they are",
        f"The tokens that hold massive activations at the output of block {tables.layer}, the most"
        f" frequent first, {len(kept)} of {len(rows):,}: mean magnitude, and in the table how"
        " often. Images have positions in the place of words.",
        columns_of(names, rows),
        chart,
        alt=f"Dots: {rows[0][0]} holds one {rows[0][3]:,} times, of {rows[0][2]:,.0f} in the mean.",
        source="Sun et al. 2024, section 2.2.",
    )


def _channels(table: ChannelTable) -> Section:
    names = ("channel", "elsewhere", "largest", "kind", "massive values", "block", "tokens above")
    rows = []
    for one in table.channels:
        kind = "massive" if one.massive else "outlier feature" if one.outlier else "other"
        numbers = (one.channel, one.ordinary, one.largest)
        rows.append((*numbers, kind, one.massive, one.layer, one.tokens))
    both = sum(one.outlier for one in table.massive)
    return Section(
        "channels",
        "Single values or whole channels?",
        "Every channel at the block of its largest value: across the mean magnitude of its other"
        " values, upwards the largest. A massive activation is a single value, high up; an outlier"
        " feature is large at most tokens, far to the right, and counts as one by an absolute"
        f" threshold of {table.threshold:g}. Of {len(rows):,} channels with massive activations:"
        f" {len(table.massive)}; outlier features: {len(table.outliers):,}; both: {both}.",
        columns_of(names, rows),
        points("elsewhere", "largest", "kind", names, ("massive", "outlier feature", "other")),
        alt=f"Points: of {len(rows):,} channels {len(table.massive)} have massive activations.",
        source="Sun et al. 2024, section 2; Dettmers et al. 2022.",
    )


def _life(host: Host, few: list[dict[str, Any]], diagnosis: Diagnosis) -> list[Section]:
    try:
        life = value_life(host.root, few, diagnosis, progress=False)
    except BadBatch:  # none of these few sequences has it
        return []
    names = ("block", "value", "spread", "elsewhere", "attention", "strongest head")
    rows = [
        (one.layer, one.value, one.std, one.ordinary, one.attention, one.strongest)
        for one in life.blocks
    ]
    most = max(life.blocks, key=lambda one: one.attention or 0.0)
    drawn = f"{100 * (most.attention or 0):.0f} % of the attention at layer {most.layer}"
    return [
        Section(
            "life",
            "The life of a value",
            f"The value of channel {life.site.channel} from the weights that write it"
            f" ({', '.join(weight.place for weight in life.weights) or 'none stands out'}) over its"
            " magnitude behind each block to the share of attention that its token draws, over"
            f" {life.carriers} sequences.",
            columns_of(names, rows),
            picture=_picture(life),
            alt=f"Lines over blocks: the value is born at block {life.site.layer} and its token"
            f" draws up to {drawn}.",
            source="Yu et al. 2024; Sun et al. 2024, section 4.",
        )
    ]


def _picture(life: ValueLife) -> bytes | None:
    """The figure, where matplotlib is at hand."""
    try:
        figure = draw_life(life)
    except MissingPackage:
        return None
    figure.savefig(stream := BytesIO(), format="png", dpi=110)
    return stream.getvalue()


def _sinks(host: Host, few: list[dict[str, Any]], found: Detection) -> list[Section]:
    try:
        kinds = sink_kinds(host.root, few, sink_tokens=_positions(found), progress=False)
    except (UnsupportedModel, BadBatch):  # the page says so where it shows attention sinks
        return []
    names = ("value", "share", "kind", "layer", "head", "update", "rank", "output rank", "alike")
    rows = [
        (
            one.value,
            one.share,
            one.kind,
            one.layer,
            one.head,
            one.update,
            one.rank,
            one.output_rank,
            one.alike,
        )
        for one in kinds.heads
    ]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.counts.items())
    return [
        Section(
            "sink-kinds",
            "What sinks send",
            "Every head: across the norm of the sinks' values over that of other tokens', upwards"
            " the share of attention that the sinks get. To the left a sink switches its head off"
            f" (nop: up to {kinds.max_value:g}); to the right it sends all tokens the same vector"
            f" (broadcast). Rank: how many directions a sequence's tokens get. {counts}.",
            columns_of(names, rows),
            points("value", "share", "kind", names, _SINKS, log=False),
            alt=f"Points, one a head: {counts}.",
            source="Fesser et al. 2026 (arXiv 2606.08105).",
        )
    ]


def _positions(found: Detection) -> tuple[int, ...] | None:
    """The patches of images that carry massive activations in most of them; None: the start."""
    if found.grid is None or not found.positions:
        return None
    born = min(position.layer for position in found.positions)
    often = [
        p.position for p in found.positions if p.layer == born and p.count * 2 > found.sequences
    ]
    return tuple(sorted(often)) or None
