"""accelerate, with patches that have parameters of their own.

Half of the layers wait in memory, half on disk, for their forward.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.contract.cases import ATTENTION, NOT_OFFLOADABLE, TYPICAL, Case, parametrize
from tests.contract.test_offload import assert_runs_and_leaves, dispatch

cases = parametrize(
    [case for case in ATTENTION if case.variant in TYPICAL and case.family not in NOT_OFFLOADABLE]
)


def places(case: Case, model: torch.nn.Module) -> list[tuple[str, set[str]]]:
    """Where the output projection of every layer rests, and the parameters of its edits.

    meta: wherever accelerate keeps them.
    """

    def added(attention: torch.nn.Module) -> set[str]:
        return {
            p.device.type
            for name, p in attention.named_parameters()
            if name.endswith(("k_bias", "v_bias"))
        }

    return [
        (projection.weight.device.type, added(attention))
        for attention, projection in case.attentions(model)
    ]


@cases
def test_patch_offloaded(case: Case, tmp_path: Path) -> None:
    """What is added stays where the layer runs."""
    model = case.model()
    dispatch(case, model, tmp_path)
    case.patch(model)
    found = places(case, model)
    assert all(
        (device, added) == ("meta", set() if case.mode == "instrument" else {"cpu"})
        for device, added in found
    )
    assert_runs_and_leaves(case, model)


@cases
def test_offload_patched(case: Case, tmp_path: Path) -> None:
    """What was added rests where the layer does."""
    model = case.patched()
    dispatch(case, model, tmp_path)
    assert all(
        (device, added) == ("meta", set() if case.mode == "instrument" else {"meta"})
        for device, added in places(case, model)
    )
    assert_runs_and_leaves(case, model)
