"""torch.compile: a patch takes effect before and after compilation, and leaves again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import biassurgery as bs
from tests.contract.cases import CASES, Case, parametrize
from tests.contract.running import accepts, assert_near, distance, logits_of

# aot_eager runs the same kernels; the smallest effect of a mode on the logits is larger.
TOLERANCE = 1e-5
# Compiling takes seconds: one mode shows that the class swap is seen, of a family's block or of
# each way from an attention to the core, and one family that every mode compiles.
ROUTES = ("llama", "falcon_alibi", "mpt", "timm_vit", "open_clip_vision", "hub_dinov2", "dinov2")
shown = [
    case
    for case in CASES
    if case.variant == "set_zero"
    or (case.variant == "attention_bias kv" and case.family in ROUTES)
    or (not (case.on_attention or case.on_values) and case.family == "timm_vit")
]
shown = [case for case in shown if not case.on_weights]  # no code changes, and no result
one_mode = parametrize(shown)
every_mode_once = parametrize(
    [case for case in CASES if case in shown or (case.family == "llama" and not case.on_weights)]
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: Any, case: Case) -> torch.Tensor:
    torch.manual_seed(123)
    with torch.no_grad():
        return logits_of(
            model(case.batch(), **({"use_cache": False} if accepts(model, "use_cache") else {}))
        )


def compiled(model: Any, case: Case) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=_in_one_graph(case.family))


@cache
def _in_one_graph(family: str) -> bool:
    """Whether the unpatched model is one graph.

    Only one that says it is not (Mixtral before transformers 5) may be none.
    """
    case = Case(family, "set_zero")
    model = case.model()
    if getattr(model, "_can_compile_fullgraph", True):
        return True
    try:
        run(torch.compile(model, backend="aot_eager", fullgraph=True), case)
    except TorchDynamoException:
        return False
    return True


@one_mode
def test_compile_then_patch(case: Case) -> None:
    model = compiled(case.model(), case)
    plain = run(case.model(), case)
    patched = run(case.patched(), case)
    assert_near(run(model, case), plain, TOLERANCE)
    case.patch(model)
    assert_near(run(model, case), patched, TOLERANCE)
    bs.unpatch_model(model)
    assert_near(run(model, case), plain, TOLERANCE)
    assert distance(patched, plain) > 2 * TOLERANCE


@every_mode_once
def test_patch_then_compile(case: Case) -> None:
    patched = run(case.patched(), case)
    assert case.mode == "instrument" or distance(patched, run(case.model(), case)) > 2 * TOLERANCE
    assert_near(run(compiled(case.patched(), case), case), patched, TOLERANCE)
