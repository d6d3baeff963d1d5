"""torch.export of a model under every mode: what is exported computes what the patched model does.

The number of sequences is open, that of text also in its length, with padding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import biassurgery as bs
from tests.contract.cases import VARIANTS, Case
from tests.models import tokens
from tests.state import output_tensor

IDENTITIES = ("instrument", "rescale")
FAST = ("llama-attention_bias_kv",)  # timm's: tests/surgery/test_tracing.py
CASES = [
    Case(family, variant)
    for family, others in (("llama", ("fix", "test")), ("timm_vit", ("transplant",)))
    for variant in VARIANTS
    if not variant.startswith(others)
]


def arguments(case: Case, rows: int, length: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """What one forward is given: images, or ids with padding behind the first sequence."""
    if case.modality == "image":
        return (case.batch(rows, seed),), {}
    ids = tokens(rows, length, seed)
    ids = ids[:, 1:].contiguous() if case.mode == "transplant" else ids
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def patched(case: Case) -> Any:
    """Levels are half of what the model has, so that every patch changes something."""
    if not (case.on_values or case.on_roles):
        return case.patched()
    sites = case.role_sites() if case.on_roles else case.sites()
    halved = [replace(site, mean=site.mean / 2, std=200.0) for site in sites]
    return case.patch(case.model(), bs.Sites(halved, origin=sites.origin))


def run(program: Any, case: Case, rows: int, length: int, seed: int) -> Tensor:
    args, kwargs = arguments(case, rows, length, seed)
    torch.manual_seed(0)  # for `noise` and `shuffle`
    with torch.no_grad():
        return output_tensor(program(*args, **kwargs))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[] if str(c) in FAST else pytest.mark.long) for c in CASES],
)
def test_what_is_exported_is_what_is_patched(case: Case) -> None:
    model = patched(case)
    args, kwargs = arguments(case, 2, 24, 1)
    rows, row_and_length = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes: Any = (rows,)
    if case.modality == "text":
        open_text = dict.fromkeys(("input_ids", "attention_mask"), row_and_length)
        shapes = {**open_text, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes).module()
    wanted = {other: run(model, case, *other) for other in ((2, 24, 1), (3, 30, 4))}
    found = {other: run(exported, case, *other) for other in wanted}
    bs.unpatch_model(model)
    if not case.on_weights:  # what was exported has the model's own weights, but not its edits
        for other in wanted:
            assert torch.equal(run(exported, case, *other), found[other])
    for other, expected in wanted.items():
        effect = (expected - run(model, case, *other)).abs().max()
        assert (effect > 1e-5) == (case.mode not in IDENTITIES)
        error = (found[other] - expected).abs().max()
        assert error <= max(1e-6, effect / 1000)
