"""What random operations are done to: a tiny model of each kind, and the patches that it can have.

The weights are those of bfloat16, so that casting a model to bfloat16 or float64 and back to
float32 loses nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from tests import models, vision
from tests.adapters import towers
from tests.state import bits

IDS = models.tokens(rows=2, length=12, delimiter_at=5)
SEED = 123


@dataclass(frozen=True)
class Patching:
    """Arguments of `patch_model` beside `layers`."""

    mode: str
    tower: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, layers: Any) -> dict[str, Any]:
        given = {} if self.mode == "transplant" else {"layers": layers}
        return given | {"mode": self.mode, "tower": self.tower} | self.options

    @property
    def applied(self) -> list[tuple[str, Any]]:
        """The modes and towers of the patches that it adds to a model."""
        towers = ["vision", "text"] if self.tower == "both" else [self.tower]
        return [(self.mode, tower) for tower in towers]

    def __repr__(self) -> str:  # findings are too long for a report
        plain = {k: v for k, v in self.options.items() if isinstance(v, str | int | float | tuple)}
        return f"<{self.mode} {self.tower} {plain}>"


@dataclass(frozen=True)
class Subject:
    """One kind of model.

    Attributes:
        name: by which failures are reported.
        run: its output, given the model.
        reading: for each tower (None: there is one only) what `calibrate` and others read.
        patchings: what can be put on it.
        threshold: from which ratio on a value counts as massive in `calibrate`.
    """

    name: str
    run: Callable[[Any], Tensor]
    reading: dict[str | None, Tensor]
    patchings: tuple[Patching, ...]
    thresholds: dict[str, float]

    def build(self) -> Any:
        return copy.deepcopy(_built(self.name))

    def read(self, model: nn.Module, tower: str | None) -> Tensor:
        """A batch of a tower, in the model's dtype."""
        batch = self.reading[tower]
        return batch if batch.dtype == torch.int64 else batch.to(dtype_of(model))

    def output(self, model: nn.Module) -> Tensor:
        """Of one forward in the model's own mode, with the same random numbers each time."""
        torch.manual_seed(SEED)
        with torch.no_grad():
            return self.run(model)


def plain_like(model: nn.Module, kind: Subject) -> Any:
    """An untouched model of the dtype and mode of another, with the same parameters frozen.

    torch multiplies by a frozen weight in another order: the last bit of an output goes by it.
    """
    return _plain(kind.name, dtype_of(model), model.training, _frozen(model, kind))


def plain_output(model: nn.Module, kind: Subject) -> Any:
    """The bits of what such a model gives."""
    return _plain_output(kind.name, dtype_of(model), model.training, _frozen(model, kind))


def _frozen(model: nn.Module, kind: Subject) -> frozenset[str]:
    names = [name for name, _ in _built(kind.name).named_parameters()]
    return frozenset(name for name in names if not model.get_parameter(name).requires_grad)


def _plain(name: str, dtype: torch.dtype, training: bool, frozen: frozenset[str]) -> Any:
    plain = subject(name).build().to(dtype).train(training)
    for each, parameter in plain.named_parameters():
        parameter.requires_grad_(each not in frozen)
    return plain


@lru_cache(maxsize=64)
def _plain_output(name: str, dtype: torch.dtype, training: bool, frozen: frozenset[str]) -> Any:
    return bits(subject(name).output(_plain(name, dtype, training, frozen)))


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def of_text(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def of_image(model: Any) -> Tensor:
    out = model(models.images(2).to(dtype_of(model)))
    return out if isinstance(out, Tensor) else out.logits


def of_both(model: Any) -> Tensor:
    pixels = towers.images().to(dtype_of(model))
    if hasattr(model, "encode_image"):
        return torch.cat([model.encode_image(pixels), model.encode_text(towers.texts())])
    out = model(input_ids=towers.texts(), pixel_values=pixels)
    return torch.cat([out.image_embeds, out.text_embeds])


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.planted("llama"),
    "gpt2": lambda: models.planted("gpt2"),
    "timm": lambda: vision.planted("timm_vit"),
    "dinov2": lambda: vision.planted("dinov2_with_registers"),
    "clip": lambda: towers.build("clip"),
    "open_clip": lambda: towers.build("open_clip"),
}
NAMES = tuple(BUILDERS)


@cache
def _built(name: str) -> Any:
    return BUILDERS[name]().to(torch.bfloat16).to(torch.float32).eval()


@cache
def dtypes_of(name: str) -> list[torch.dtype]:
    """What an untouched model runs in: CLIP of transformers 4 not in float64."""
    kind = subject(name)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with suppress(RuntimeError):
            kind.output(kind.build().to(dtype))
            found.append(dtype)
    assert found[:2] == [torch.float32, torch.bfloat16]
    return found


@cache
def subject(name: str) -> Subject:
    if name in ("llama", "gpt2"):
        reading: dict[str | None, Tensor] = {None: IDS}
        run, thresholds = of_text, {}
    elif name in ("timm", "dinov2"):
        reading = {None: models.images(2)}
        run, thresholds = of_image, {}
    else:
        reading = {"vision": towers.images(), "text": towers.texts()}
        run, thresholds = of_both, {"min_magnitude": 0.5, "min_ratio": 3.0}
    patchings = [
        patching
        for tower, batch in reading.items()
        for patching in _patchings(_built(name), tower, batch, thresholds)
    ]
    if len(reading) == 2:
        patchings += [Patching("instrument", "both"), Patching("attention_bias", "both")]
    return Subject(name, run, reading, tuple(patchings), thresholds)


def _patchings(
    model: Any, tower: Any, batch: Tensor, thresholds: dict[str, float]
) -> list[Patching]:
    sites = bs.calibrate(model, batch, tower=tower, **thresholds)
    assert len(sites) > 0
    found = [
        Patching(mode, tower, {"sites": sites})
        for mode in ("set_mean", "set_zero", "noise", "shuffle", "zero_random")
    ]
    found += [Patching("set_value", tower, {"sites": sites, "value": 50.0})]
    found += [
        Patching("set_value", tower, {"value": 40.0, "channels": (3, 7), "positions": (0, 2)}),
        Patching("instrument", tower),
        Patching("attention_bias", tower, {"kind": "off_by_one"}),
        Patching("attention_bias", tower, {"kind": "kv", "init": "zero_effect"}),
    ]
    found += [
        Patching("attention_bias", tower, {"kind": kind, "std": 1.0, "trainable": trainable})
        for kind in ("kv", "k", "v", "sink_logit", "gate")
        for trainable in ("all", "bias")
    ]
    if batch.dtype == torch.int64 and tower is None:
        found.append(_transplant(model, batch))
    elif tower is None:
        means = bs.calibrate_registers(model, batch)
        found += [Patching("fix_registers", tower, {"means": means, "fill": f}) for f in FILLS]
        neurons = bs.find_register_neurons(model, batch, count=3)
        found.append(Patching("test_time_registers", tower, {"neurons": neurons}))
    return found


FILLS = ("mean", "zero", "noise", "shuffle")


def _transplant(model: Any, batch: Tensor) -> Patching:
    return Patching("transplant", None, {"key_values": bs.calibrate_key_values(model, batch)})
