"""What a diagnosis comes to: a verdict in four lines, and advice as calls to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from biassurgery.findings.diagnosed import (
    FLOAT16,
    Float16,
    LinearRange,
    Measured,
    SinkUse,
    SuperWeight,
)
from biassurgery.findings.render import number
from biassurgery.findings.sites import Sites

RATIO = 10.0
COSTLY = 1.05  # eviction that makes the perplexity so many times as high is worth a word


class Evidence(NamedTuple):
    """What a verdict is made from; the attributes are those of `Diagnosis`."""

    sites: Sites
    carriers: Mapping[str, int]
    tokens: int
    linears: Sequence[LinearRange]
    super_weights: Sequence[SuperWeight]
    float16: Float16
    sinks: SinkUse | None
    measured: Sequence[Measured]
    modality: str
    not_told: Sequence[str] = ()

    @property
    def ruled(self) -> list[LinearRange]:
        """The linear layers whose range massive tokens rule."""
        return [linear for linear in self.linears if linear.ratio >= RATIO]

    @property
    def confirmed(self) -> list[SuperWeight]:
        return [weight for weight in self.super_weights if weight.confirmed]


def verdict(e: Evidence) -> tuple[str, str, str, str]:
    """Four lines: massive activations, int8, float16, and the first token."""
    left_out = f" ({len(e.not_told)} more not looked at)" if e.not_told else ""
    return _massive(e), _int8(e) + left_out, _float16(e) + left_out, _sinks(e)


def advice(e: Evidence) -> tuple[str, ...]:
    """What to do, each with its call; empty where there is nothing to do."""
    found = []
    if len(e.sites):
        found += [*_advice_on_int8(e), *_advice_on_weights(e), *_advice_on_sinks(e)]
    return (*found, *_advice_on_float16(e))


def _massive(e: Evidence) -> str:
    if not len(e.sites):
        return f"massive activations: none in {e.tokens:,} tokens"
    top = max(e.sites, key=lambda site: abs(site.mean))
    born = min(site.layer for site in e.sites if site.channel == top.channel)
    tokens = ", ".join(f"{count:,} {role}" for role, count in e.carriers.items() if count)
    return (
        f"massive activations: up to {number(abs(top.mean))} (channel {top.channel}, from block"
        f" {born} on), carried by {tokens} tokens of {e.tokens:,}"
    )


def _int8(e: Evidence) -> str:
    if not e.ruled:
        return (
            f"int8: none of the {len(e.linears)} linear layers reads a range that massive tokens"
            " rule"
        )
    worst = max(e.ruled, key=lambda linear: linear.ratio)
    return (
        f"int8: massive tokens rule what {len(e.ruled)} of {len(e.linears)} linear layers read"
        f" ({worst.name}: {number(worst.largest)}, others {number(worst.ordinary)})"
    )


def _float16(e: Evidence) -> str:
    f = e.float16
    inside = f.overflows_inside
    also = f"; {inside[0].name} {inside[0].what} {number(inside[0].largest)}" if inside else ""
    if f.overflows is not None:
        return (
            f"float16: the residual stream overflows from block {f.overflows} on (largest"
            f" {number(f.largest)}, float16 ends at 65,504); {_fraction(f.factor)} of it fits{also}"
        )
    if inside:
        return f"float16: overflows inside a branch{also}"
    largest = max([f.largest, *(part.largest for part in f.inside)])
    if not largest:
        return "float16: nothing but zeros was seen"
    return f"float16: fits, with head room of {FLOAT16 / largest:.3g} (largest {number(largest)})"


def _sinks(e: Evidence) -> str:
    if e.sinks is None:
        return "first token: its attention cannot be read in this model"
    says = f"first token: gets {100 * e.sinks.share:.0f} % of the attention of later ones"
    if e.modality == "image":
        return says
    if e.sinks.cost is None:
        return f"{says}; cost of its eviction not measured ({e.sinks.reason})"
    assert e.sinks.perplexity is not None  # there is a cost
    assert e.sinks.evicted is not None
    return (
        f"{says}; evicted from the cache, perplexity {number(e.sinks.perplexity)} ->"
        f" {number(e.sinks.evicted)}"
    )


def _fraction(factor: float) -> str:
    return f"1/{1 / factor:.0f}"


def _advice_on_int8(e: Evidence) -> list[str]:
    if not e.ruled:
        return []
    names = ", ".join(linear.name for linear in e.ruled)
    told = [
        f"static int8: leave {names} in floating point, or scale them per token:"
        " biassurgery.integrations.torchao.quantize_static(model, batches,"
        " ignore=diagnosis.ignore(), smooth=0.5); for llm-compressor and ONNX Runtime:"
        " biassurgery.integrations.ignore_lists"
    ]
    if e.modality == "text" and any(site.role == "start" for site in e.sites):
        told.append(
            "or write the calibrated values back at the start token, so that what makes them may"
            ' clip: bs.patch_model(model, "pin", sites=diagnosis.sites)'
        )
    told.append("dynamic int8 with a scale per token hardly suffers: nothing needs to be done")
    return told


def _advice_on_weights(e: Evidence) -> list[str]:
    if not e.confirmed:
        return []
    weight = max(e.confirmed, key=lambda weight: weight.loss or 0.0)
    return [
        f"pruning and weights of few bits: keep {weight.place} = {weight.value:.4g} exact; without"
        f" it the loss rises by {weight.loss:.2f} nats a token"
    ]


def _advice_on_float16(e: Evidence) -> list[str]:
    told = []
    if e.float16.overflows is not None:
        told.append(
            'float16: load it in bfloat16, or bs.patch_model(model, "rescale",'
            f" factor={e.float16.factor}) in float32, save it, and load that in float16"
        )
    if e.float16.overflows_inside:
        names = ", ".join(dict.fromkeys(part.name for part in e.float16.overflows_inside))
        told.append(f"float16: {names} overflow inside, which rescaling leaves: use bfloat16")
    return told


def _advice_on_sinks(e: Evidence) -> list[str]:
    if e.sinks is None or e.sinks.cost is None or e.sinks.cost < COSTLY:
        return []
    return [
        "serving: never evict the first token from the cache (bs.SinkCache keeps it), or let its"
        ' keys and values become biases: bs.patch_model(model, "transplant",'
        " key_values=bs.calibrate_key_values(model, batches))"
    ]
