"""A finding that holds NaN or infinity is refused by every mode that takes one.

It is refused where it is made; here it has been written to since, which nothing but the use can
notice. The model is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, LevelOverflow
from tests.contract.cases import CASES, Case, parametrize
from tests.state import untouched

FAMILIES = ("llama", "gpt2", "timm_vit", "hub_dinov2")
WORST = (math.nan, math.inf, -math.inf)
KINDS = ("kv", "k", "v")  # of attention_bias, that begin as key values

Given = dict[str, Any]  # arguments of patch_model


def on_sites(case: Case, worst: float) -> Iterator[tuple[str, Given]]:
    """As loose sites, which become `Sites` first, and written into `Sites` that were right."""
    for name in ("mean", "std", "gate"):
        sites = case.sites()
        loose = [replace(sites[0], **{name: worst}), *sites[1:]]
        yield f"{name} is not finite", case.arguments() | {"sites": loose}
        object.__setattr__(sites[-1], name, worst)
        yield f"{name} is not finite", case.arguments(sites)


def with_tensor(finding: Any, name: str, worst: float) -> Any:
    """A copy of a finding, one number of which is written over."""
    tensors = {
        field.name: value.clone()
        for field in fields(finding)
        if isinstance(value := getattr(finding, field.name), torch.Tensor)
    }
    copy = replace(finding, **tensors)
    tensors[name].view(-1)[-1] = worst
    return copy


def on_key_values(case: Case, worst: float) -> Iterator[tuple[str, Given]]:
    option = "key_values" if case.mode == "transplant" else "init"
    for name in ("keys", "values", "key_std", "value_std"):
        spoiled = with_tensor(case.key_values(), name, worst)
        given = case.arguments() if case.mode == "transplant" else {"kind": case.variant.split()[1]}
        yield f"{name} is not finite", given | {option: spoiled}


def on_means(case: Case, worst: float) -> Iterator[tuple[str, Given]]:
    for name in ("values", "std", "cls"):
        given = case.arguments()
        yield f"{name} is not finite", given | {"means": with_tensor(given["means"], name, worst)}


def on_neurons(case: Case, worst: float) -> Iterator[tuple[str, Given]]:
    given = case.arguments()
    neurons = replace(given["neurons"])
    object.__setattr__(neurons, "threshold", worst)
    yield "threshold is not finite", given | {"neurons": neurons}
    neurons = replace(given["neurons"])
    first = neurons.neurons[0]._replace(activation=worst)
    object.__setattr__(neurons, "neurons", (first, *neurons.neurons[1:]))
    yield "is not finite", given | {"neurons": neurons}


def spoiled(case: Case) -> Callable[[Case, float], Iterator[tuple[str, Given]]] | None:
    """What to spoil of what a mode is given; None: it is given no finding."""
    if case.mode == "attention_bias" and case.variant.split()[1] not in KINDS:
        return None
    if case.mode in ("attention_bias", "transplant"):
        return on_key_values if case.modality == "text" else None
    if case.on_registers:
        return on_means
    if case.on_tokens:
        return on_neurons
    return on_sites if (case.on_values or case.on_roles) and not case.positional else None


@parametrize([case for case in CASES if case.family in FAMILIES and spoiled(case)])
def test_a_finding_that_is_not_finite(case: Case) -> None:
    model = case.model()
    spoil = spoiled(case)
    assert spoil is not None
    tried = 0
    with untouched(model, case.batch()):
        for worst in WORST:
            for pattern, given in spoil(case, worst):
                with pytest.raises(BadOption, match=pattern):
                    bs.patch_model(model, case.mode, **given)
                assert bs.patches(model) == ()
                tried += 1
    assert tried >= 6


def test_a_level_that_no_float32_holds() -> None:
    """It would be infinite where it is used: as a gate, one that nothing passes."""
    model = Case("llama", "set_zero").model()
    site = Case("llama", "set_zero").sites()[0]
    for name in ("mean", "std", "gate"):
        with pytest.raises((BadOption, LevelOverflow), match=name):
            bs.patch_model(model, "set_zero", sites=[replace(site, **{name: 1e300})])
    assert bs.patches(model) == ()
