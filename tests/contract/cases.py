"""What the battery runs over: every planted family with every mode.

A new text architecture is one line: its row in `DECODERS` of tests/models.py, with its version in
`SINCE` if it came later. A new image model is an entry in `FAMILIES` of tests/vision.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import biassurgery as bs
from tests import encoders, models, vision
from tests.vision_builders import TOKENS

LENGTH = 12
DELIMITER_AT = 5
VALUE = -2345.5
FACTOR = 0.25
# what the explicit writes of `set_value` go to
CHANNELS = (3, models.CHANNEL)
POSITIONS = (0, 4)

# The parameters that each kind of explicit attention bias adds.
PARAMETERS = {
    "kv": ("k_bias", "v_bias"),
    "k": ("k_bias",),
    "v": ("v_bias",),
    "sink_logit": ("sink_logit",),
    "gate": ("gate",),
}

# Each variant of a mode: its name in the support matrix, the mode, its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "set_mean": ("set_mean", {}),
    "set_zero": ("set_zero", {}),
    "set_value": ("set_value", {"value": VALUE}),
    "set_value at positions": (
        "set_value",
        {"value": VALUE, "channels": CHANNELS, "positions": POSITIONS},
    ),
    "noise": ("noise", {}),
    "shuffle": ("shuffle", {}),
    "zero_random": ("zero_random", {}),
    "instrument": ("instrument", {}),
    **{
        f"attention_bias {kind}": ("attention_bias", {"kind": kind, "init": "normal", "std": 1.0})
        for kind in PARAMETERS
    },
    "attention_bias off_by_one": ("attention_bias", {"kind": "off_by_one"}),
    "transplant": ("transplant", {}),
    **{
        f"fix_registers {fill}": ("fix_registers", {"fill": fill})
        for fill in ("mean", "zero", "noise", "shuffle")
    },
    "test_time_registers": ("test_time_registers", {}),
    "pin": ("pin", {}),
    "rescale": ("rescale", {"factor": FACTOR}),
}
# Every mode runs on these families, and these modes on every family: between them, each way into a
# host and each thing that a mode does there. The other pairs are `long`.
EVERY_MODE = ("llama", "timm_vit")
EVERY_FAMILY = (
    "set_mean",
    "set_value at positions",
    "instrument",
    "attention_bias kv",
    "transplant",
    "fix_registers mean",
    "test_time_registers",
)
# What becomes of an object (copied, pickled, left half way) is the same however its host is built:
# one of each library stands for it there.
OBJECTS = (*EVERY_MODE, "gpt2", "open_clip_vision", "hub_dinov2")
# Families that go the way of another: mistral's, gpt_neox's, dinov2_with_registers', vit_mae's.
ALIKE = ("mixtral", "phi", "dinov2", "vit")
# What encoders run: what decoders have shown of a mode, they need not show again.
OF_ENCODERS = ("set_mean", "set_zero", "instrument", "attention_bias kv")
# Of these, one that ends its blocks in a norm and one that does not; the others are `long`.
EVERY_ENCODER = ("bert", "modernbert")
# The version of its library with which a family came, where an older one is supported, too.
# Encoders compute their softmax themselves before, each in a way of its own.
SINCE: dict[str, str] = dict.fromkeys(encoders.FAMILIES, "5.0")

ON_ATTENTION = ("instrument", "attention_bias", "transplant")
ON_REGISTERS = ("fix_registers",)
ON_TOKENS = ("test_time_registers",)
ON_ROLES = ("pin",)
ON_WEIGHTS = ("rescale",)
# Nothing but the way through the core, parameters, positions.
TYPICAL = ("instrument", "attention_bias kv", "transplant")


@dataclass(frozen=True)
class Case:
    """One family with one variant of a mode."""

    family: str
    variant: str

    def __str__(self) -> str:
        return f"{self.family}-{self.variant.replace(' ', '_')}"

    @property
    def modality(self) -> str:
        return "image" if self.family in vision.FAMILIES else "text"

    @property
    def decodes(self) -> bool:
        """Whether the model is causal, and continues a text: encoders see all of it at once."""
        return self.family in models.FAMILIES

    @property
    def library(self) -> str:
        """Whose version decides what the model is."""
        return vision.FAMILIES[self.family].library if self.modality == "image" else "transformers"

    @property
    def mode(self) -> str:
        return VARIANTS[self.variant][0]

    @property
    def on_attention(self) -> bool:
        """Whether the patch changes attention modules instead of what blocks return."""
        return self.mode in ON_ATTENTION

    @property
    def on_registers(self) -> bool:
        """Whether the patch writes over register tokens, massive or not."""
        return self.mode in ON_REGISTERS

    @property
    def on_tokens(self) -> bool:
        """Whether the patch adds a token inside the model."""
        return self.mode in ON_TOKENS

    @property
    def on_values(self) -> bool:
        """Whether the patch is one on massive activations."""
        others = (*ON_ATTENTION, *ON_REGISTERS, *ON_TOKENS, *ON_ROLES, *ON_WEIGHTS)
        return self.mode not in others

    @property
    def on_roles(self) -> bool:
        """Whether the patch writes at tokens of a role, massive or not."""
        return self.mode in ON_ROLES

    @property
    def on_weights(self) -> bool:
        """Whether the patch changes weights, and nothing that the model says."""
        return self.mode in ON_WEIGHTS

    @property
    def several(self) -> Any:
        """`layers` of a patch on three layers.

        A start token leaves all or none, and an added one goes through all.
        """
        if self.mode == "transplant" or self.on_tokens or self.on_weights:
            return None
        return [models.LAYER, models.LAYER + 1, models.LAYER + 2]

    @property
    def positional(self) -> bool:
        """Whether the patch writes at positions, padding included, instead of at massive values."""
        return "positions" in VARIANTS[self.variant][1]

    @property
    def row_by_row(self) -> bool:
        """Whether what happens to a sequence is the same alone, in any company, at any offset."""
        return self.mode != "shuffle" and not self.positional

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new planted model in eval mode."""
        if self.modality == "image":
            model = vision.planted(self.family).to(dtype)
        else:
            model = _maker(self.family).planted(self.family, dtype)
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        return model

    def block(self, model: nn.Module) -> nn.Module:
        """A block that is patched, or whose attention is, found without the library."""
        return _maker(self.family).blocks(model, self.family)[models.LAYER]

    def attentions(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The attention of every layer with its output projection."""
        return _maker(self.family).attentions(model, self.family)

    def changed(self, model: nn.Module) -> nn.Module:
        """The module in that block whose class is changed."""
        if self.on_weights:
            return model
        if self.on_tokens:
            return vision.first(self.block(model), vision.FAMILIES[self.family].writer)
        return self.attentions(model)[models.LAYER][0] if self.on_attention else self.block(model)

    def batch(self, rows: int = 2, seed: int = 1) -> Tensor:
        """What the model takes as its only argument: token ids (rows, LENGTH), or images."""
        if self.modality == "image":
            return models.images(rows, seed)
        return models.tokens(rows, LENGTH, seed, DELIMITER_AT)

    def massive(self, batch: Tensor) -> Tensor:
        """(B, T) bool: the tokens that were planted to carry a massive activation."""
        if self.modality == "text":
            return (batch == models.START_ID) | (batch == models.DELIMITER_ID)
        family = vision.FAMILIES[self.family]
        return torch.zeros(len(batch), TOKENS + family.prefix, dtype=torch.bool).index_fill(
            1, torch.tensor(family.tokens), True
        )

    def registers(self) -> list[int]:
        """Where the registers of the family are in the sequence."""
        family = vision.FAMILIES[self.family]
        return list(range(family.prefix - family.registers, family.prefix))

    def sites(self, std: float = 0.01) -> bs.Sites:
        """The calibrated sites of the family, with a std of our choice, which `noise` reads."""
        sites = _calibrated(self.family)
        return bs.Sites([replace(site, std=std) for site in sites], origin=sites.origin)

    def role_sites(self) -> bs.Sites:
        """Sites of tokens with a fixed place: the calibrated ones of start tokens, or made up."""
        if self.modality == "text":
            sites = self.sites()
            starts = [replace(s, mean=s.mean / 2) for s in sites if s.role == "start"]
            return bs.Sites(starts, origin=sites.origin)
        places = [(layer, role) for layer in (1, 2, 3) for role in self.placed()]
        return bs.Sites(
            [
                bs.Site(layer, models.CHANNEL, role, mean=1000.0 + position)
                for layer, role in places
                for position in [self.placed().index(role)]
            ]
        )

    def placed(self) -> list[str]:
        """The roles of the prefix tokens of an image."""
        family = vision.FAMILIES[self.family]
        registers = [f"register:{i}" for i in range(family.registers)]
        return [*["cls"] * (family.prefix - family.registers), *registers]

    def key_values(self) -> bs.KeyValues:
        """What the start token of the family gives to attention."""
        return _key_values(self.family)

    def arguments(
        self, sites: bs.Sites | None = None, layers: Any = None, **options: Any
    ) -> dict[str, Any]:
        """What the mode is applied with; `options` over the variant's own."""
        given = {**VARIANTS[self.variant][1], **options}
        if self.on_registers:
            given.setdefault("means", _register_means(self.family))
        if self.on_tokens:
            given.setdefault("neurons", _register_neurons(self.family))
        if self.on_weights and self.modality == "image":
            given.setdefault("batches", self.batch())
        if self.on_roles:
            sites = sites or self.role_sites()
            return {"sites": sites, "layers": models.LAYER if layers is None else layers, **given}
        if self.on_values:
            return {
                "sites": sites or self.sites(),
                "layers": models.LAYER if layers is None else layers,
                **given,
            }
        if self.mode == "transplant":
            given.setdefault("key_values", self.key_values())
        return {"sites": sites, "layers": layers, **given}

    def patch(
        self, model: Any, sites: bs.Sites | None = None, layers: Any = None, **options: Any
    ) -> Any:
        """Apply the mode; parameters that begin at random do so with the same numbers each time."""
        torch.manual_seed(7)
        return bs.patch_model(model, self.mode, **self.arguments(sites, layers, **options))

    def patched(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new patched model."""
        return self.patch(self.model(dtype))

    def save_weights(self, model: Any, folder: Path) -> None:
        """Write a checkpoint in the way of the model's own library."""
        if self.modality == "text":
            model.save_pretrained(folder)
        else:
            torch.save(model.state_dict(), folder / "weights.pt")

    def load_weights(self, folder: Path) -> Any:
        """A model in eval mode that was never patched, with the weights of a checkpoint."""
        if self.modality == "text":
            return type(self.model()).from_pretrained(folder).eval()
        model = self.model()
        for tensor in model.state_dict().values():
            tensor.zero_()
        model.load_state_dict(torch.load(folder / "weights.pt"), strict=not self.on_attention)
        return model


def _maker(family: str) -> Any:
    """The module that plants a family."""
    return next(m for m in (models, encoders, vision) if family in m.FAMILIES)


@cache
def _calibrated(family: str) -> bs.Sites:
    case = Case(family, "set_mean")
    sites = bs.calibrate(case.model(), case.batch(4, seed=7))
    assert sites.layers() == list(range(models.LAYER, models.LAYERS))
    assert {site.channel for site in sites} == {models.CHANNEL}
    return sites


@cache
def _key_values(family: str) -> bs.KeyValues:
    key_values = bs.calibrate_key_values(
        models.planted(family), models.tokens(4, LENGTH, 7, DELIMITER_AT)
    )
    assert key_values.spread < 1e-3  # the start token is a constant
    return key_values


@cache
def _register_means(family: str) -> bs.RegisterMeans:
    return bs.calibrate_registers(vision.planted(family), models.images(4, seed=7))


@cache
def _register_neurons(family: str) -> bs.RegisterNeurons:
    neurons = bs.find_register_neurons(vision.planted(family), models.images(4, seed=7), count=2)
    planted = (models.LAYER, models.START_ID)
    assert planted in {(neuron.layer, neuron.neuron) for neuron in neurons.neurons}
    return neurons


def _exists(case: Case) -> bool:
    """An image has no start token, that of an encoder sees the text, and few models have registers.

    A test-time register takes the place of patches, and tables of relative positions have no place
    for it.
    """
    family = vision.FAMILIES.get(case.family)
    if case.on_tokens:
        return (
            family is not None
            and case.family != "timm_relative"
            and min(family.tokens) >= family.prefix
        )
    if case.on_registers:
        return family is not None and family.registers > 0
    if case.family in encoders.FAMILIES:
        return case.variant in OF_ENCODERS
    if case.on_roles:
        return family is None or family.prefix > 0
    return case.decodes or case.mode != "transplant"


CASES = [
    case
    for family in (*models.FAMILIES, *encoders.FAMILIES, *vision.FAMILIES)
    for variant in VARIANTS
    if _exists(case := Case(family, variant))
]


def parametrize(cases: list[Case], families: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Run a check on these cases.

    Args:
        cases: all of them.
        families: those that stand for all others; none: all count.
    """
    marked = [_marked(case, families) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


def _marked(case: Case, families: Sequence[str]) -> Any:
    """A case that is skipped where the installed library does not have it.

    It is left out of `make test` where others stand for it.
    """
    marks: list[pytest.MarkDecorator] = []
    since = SINCE.get(case.family, "0")
    if Version(version(case.library)) < Version(since):
        reason = f"{case.family} is in the battery with {case.library} {since} or newer"
        marks.append(pytest.mark.skip(reason=reason))
    one_of_many = case.family in encoders.FAMILIES and case.family not in EVERY_ENCODER
    one_of_many |= case.family in ALIKE or (len(families) > 0 and case.family not in families)
    if one_of_many or (case.family not in EVERY_MODE and case.variant not in EVERY_FAMILY):
        marks.append(pytest.mark.long)
    return pytest.param(case, marks=marks)


# Rescaled weights have checks of their own.
every_case = parametrize([case for case in CASES if not case.on_weights])
activation_cases = parametrize([case for case in CASES if case.on_values])
REGISTERS = [case for case in CASES if case.on_registers]
register_cases = parametrize(REGISTERS)
# accelerate cannot send these away, patched or not: parts of them read weights of modules that they
# do not call.
NOT_OFFLOADABLE = ("timm_eva", "timm_relative", "siglip_vision", "open_clip_vision")
ATTENTION = [case for case in CASES if case.on_attention]
attention_cases = parametrize(ATTENTION)
# What does not depend on the kind of explicit bias: one of them stands for all.
typical = [
    case
    for case in CASES
    if not case.on_weights and (not case.on_attention or case.variant in TYPICAL)
]
typical_cases = parametrize(typical)
object_cases = parametrize(typical, OBJECTS)
# An image has no cache, no padding and no documents: these checks are a property of text, not
# something image models lack.
text_cases = parametrize([case for case in typical if case.modality == "text"])
# Nor has an encoder a cache, and packed documents see each other in it.
decoding_cases = parametrize([case for case in typical if case.decodes])
