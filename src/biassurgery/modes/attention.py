"""The modes on attention: watched, with an explicit bias, or with a transplanted start token."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.layers import Layers, all_or_indices, block_dtype
from biassurgery.adapters.registry import Host
from biassurgery.edits.bias import BIASES, Bias, Initial, KeyBias
from biassurgery.edits.transplant import transplant_edit
from biassurgery.errors import AlreadyPatched, BadOption
from biassurgery.findings.finding import check_fits
from biassurgery.findings.key_values import KeyValues, key_value_facts
from biassurgery.findings.sites import Sites
from biassurgery.measure.key_values import check_causal
from biassurgery.measure.token_positions import count_edits, shift_edits
from biassurgery.modes.base import Mode, Place
from biassurgery.modes.varying import warn_of_varying_key_values
from biassurgery.surgery.attention import Attention, AttentionEdit
from biassurgery.surgery.edit import edits_in
from biassurgery.surgery.starts import StartEdit

Init = Literal["zero_effect", "normal"]
# relative spread of the start token's key or value up to which it counts as a constant


class AttentionMode(Mode):
    """A mode that changes attention modules."""

    needs_sites: ClassVar[bool] = False

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        self.check_no_sites(sites)
        places = []
        for layer, attention in attentions(host, all_or_indices(host, layers, "attention")).items():
            edit = self.edit(host, layer, attention)
            if edit.child in attention.module._modules:
                raise AlreadyPatched(
                    f"mode: {edit.child} is on layer {layer} already; unpatch_model(model,"
                    f" {self.name!r}) first."
                )
            edit.to(block_dtype(host.blocks[layer]))
            places.append(attention.place(layer, edit))
        return places

    @abstractmethod
    def edit(self, host: Host, layer: int, attention: Attention) -> AttentionEdit:
        """The edit of one layer, in any dtype."""


class Watch(AttentionEdit):
    """Nothing but the way through the core."""

    child = "instrument"
    reads_call = False

    def __init__(self, route: Any) -> None:
        super().__init__()
        self.route = route


@dataclass(frozen=True)
class Instrument(AttentionMode):
    """The attention goes through this library's core, which computes the same numbers."""

    name: ClassVar[str] = "instrument"

    def edit(self, host: Host, layer: int, attention: Attention) -> AttentionEdit:
        return Watch(attention.route)


@dataclass(frozen=True)
class AttentionBias(AttentionMode):
    """Explicit attention biases, new parameters of every attention module.

    Attributes:
        kind: `kv`: one key k' and value v' more in every head, neither rotated nor masked (Sun et
            al. 2024, equation 3); `k`: the same with v' = 0; `v`: v' added to what a head returns
            (both Gu et al. 2025); `sink_logit`: a learned logit with value 0 (gpt-oss);
            `off_by_one`: logit and value 0 (softmax1), no parameters; `gate`: each head times 2
            sigmoid(gate . x) of what the attention reads (Qiu et al. 2025); or that of any other
            `biassurgery.extend.Bias`.
        init: `normal` (default): N(0, std^2), with the logit of equation 3; `zero_effect`: the
            model computes what it did, and a bias in the softmax gets no gradient; or `KeyValues`,
            for the kinds kv, k and v.
        std: of `normal`.
        trainable: `all`: parameters of the model stay as trainable as they were; `bias`: only the
            new ones are, until unpatched.
    """

    name: ClassVar[str] = "attention_bias"
    kind: str = "kv"
    init: Init | KeyValues | None = field(default=None, compare=False)
    std: float = field(default=0.02, compare=False)
    trainable: Literal["all", "bias"] = field(default="all", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.init, KeyValues) and self.init not in (*get_args(Init), None):
            raise BadOption(f"init: {self.init!r}; use 'zero_effect', 'normal' or KeyValues.")
        if not isinstance(self.std, Real) or not 0 < self.std < math.inf:
            raise BadOption(f"std: {self.std!r}; give a positive number.")
        if self.trainable not in ("all", "bias"):
            raise BadOption(f"trainable: {self.trainable!r}; use 'all' or 'bias'.")
        self._check_kind(BIASES.find(self.kind))

    def _check_kind(self, bias: type[Bias]) -> None:
        """Raise `BadOption` if this kind of bias has not what the other options need."""
        trained = self.trainable == "bias"
        if not bias.has_parameters and self.init is not None:
            raise BadOption(
                f"init: {self.init!r}; {self.kind} has no parameters, and no way to be without"
                " effect; leave init= out."
            )
        if not bias.has_parameters and trained:
            raise BadOption(
                f"trainable: 'bias', but {self.kind} has no parameters; leave trainable= out."
            )
        if not bias.has_key_values and isinstance(self.init, KeyValues):
            raise BadOption(
                f"init: KeyValues; {self.kind} has no key and no value; use 'zero_effect' or"
                " 'normal'."
            )
        if not bias.learns_from_zero_effect and trained and self.init == "zero_effect":
            raise BadOption(
                f"trainable: 'bias', but {self.kind} gets no gradient from init='zero_effect'; use"
                " init='normal'."
            )

    @property
    def freezes(self) -> bool:
        return self.trainable == "bias"

    def classes(self) -> dict[str, type]:
        return {"kind": BIASES[self.kind]}

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        places = super().places(host, sites, layers)
        has_key = any(isinstance(place.edit, KeyBias) for place in places)
        return places + (count_edits(host) if has_key else [])

    def edit(self, host: Host, layer: int, attention: Attention) -> Bias:
        if isinstance(self.init, KeyValues):
            check_key_values(host, attention, self.init)
        bias = BIASES[self.kind](attention, Initial(self.init == "zero_effect", self.std))
        if isinstance(self.init, KeyValues):
            bias.fill(self.init.keys[layer], self.init.values[layer])
        return bias

    def options(self) -> dict[str, Any]:
        # Not `init`: what the parameters began with is of no use later.
        return {"kind": self.kind, "std": self.std, "trainable": self.trainable}


@dataclass(frozen=True)
class Transplant(AttentionMode):
    """The start token's key and value become explicit biases, so that it can leave the input.

    Every later token then sees what it saw before: exactly, by induction over the layers, where the
    start token is a constant. The positions of the remaining tokens stay what they were, counted
    from 1. Feed the model sequences without their start token; position ids, where they are given,
    count those tokens from 0 as ever.

    Attributes:
        key_values: what `calibrate_key_values` measured on this model.
    """

    name: ClassVar[str] = "transplant"
    replaces_start: ClassVar[bool] = True
    key_values: KeyValues = field(compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.key_values, KeyValues):
            raise BadOption(
                f"key_values: {type(self.key_values).__name__}; pass what"
                " calibrate_key_values(model, batches) returned."
            )

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        check_causal(host)
        if all_or_indices(host, layers, "attention") not in (None, list(range(len(host.blocks)))):
            raise BadOption(
                f"layers: {layers!r}; a start token leaves all layers or none; leave layers= out."
            )
        if any(isinstance(edit, StartEdit) for _, edit in edits_in(host.root)):
            raise BadOption(
                "mode: 'transplant' takes the start token out of the input, and 'pin', which is on"
                " the model, writes at it; unpatch_model(model, 'pin') first."
            )
        places = super().places(host, sites, "all") + shift_edits(host)
        warn_of_varying_key_values(self.key_values)
        return places

    def edit(self, host: Host, layer: int, attention: Attention) -> Bias:
        check_key_values(host, attention, self.key_values)
        return transplant_edit(host, layer, attention, self.key_values)

    def options(self) -> dict[str, Any]:
        return self.key_values.header()

    def tensors(self) -> dict[str, Tensor]:
        # Keys and values are those of the edits.
        return {name: getattr(self.key_values, name) for name in ("key_std", "value_std")}

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Transplant:
        layers = range(len({name.split(".")[0] for name in tensors if "." in name}))
        keys, values = (
            torch.stack([tensors[f"{layer}.{name}"] for layer in layers]).float()
            for name in ("k_bias", "v_bias")
        )
        return cls(
            KeyValues(
                keys,
                values,
                tensors.get("key_std", torch.zeros_like(keys)),  # earlier versions left them out
                tensors.get("value_std", torch.zeros_like(values)),
                options["count"],
                options["architecture"],
                options.get("start"),
            )
        )


def check_key_values(host: Host, attention: Attention, key_values: KeyValues) -> None:
    """Raise `Incompatible` if key values are those of another model, `BadOption` if not finite."""
    key_values.check()
    shape = attention.shape
    heads = (len(host.blocks), shape.kv_heads)
    check_fits(
        "key_values",
        key_values.measured_on,
        key_value_facts(host.architecture, (*heads, shape.key), (*heads, shape.value)),
        "calibrate_key_values(model, batches) on it",
    )
