"""accelerate's `prepare` on patched models, and patches on prepared ones.

Offloading: tests/contract/test_offload.py and test_offload_attention.py, for every family.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import biassurgery as bs
from tests.integrations.test_pipeline import patch
from tests.models import planted, tokens
from tests.state import output_of

IDS = tokens(2, 12)
WAYS = [
    pytest.param(mode, when, precision, marks=[] if mode == "pin" else pytest.mark.long)
    for mode in ("pin", "set_zero", "attention_bias", "transplant")
    for when in ("before", "after")
    for precision in ("no", "bf16")
]


@pytest.fixture(autouse=True)
def _a_state_of_its_own() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)  # else all of the process has one precision


@pytest.mark.parametrize(("mode", "when", "precision"), WAYS)
def test_prepare(mode: str, when: str, precision: str) -> None:
    """`prepare` puts an autocast forward on the object itself: a patch is inside, and goes."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    stock = accelerator.prepare(planted("llama"))
    plain = output_of(stock, IDS)
    model = planted("llama")
    if when == "before":
        patch(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if when == "after":
        patch(prepared, mode)
    wanted = output_of(patch(planted("llama"), mode), IDS)
    if precision == "no":
        assert torch.equal(output_of(prepared, IDS), wanted)
        assert (wanted - plain).abs().max() > 0.5
    else:
        off = (output_of(prepared, IDS) - wanted).abs().max()
        assert 0 < off < 0.1 < 0.5 < (output_of(prepared, IDS) - plain).abs().max()
    accelerator.backward(prepared(IDS, labels=IDS, use_cache=False).loss)
    assert all(p.grad is not None for n, p in model.named_parameters() if "mlp" in n)
    bs.unpatch_model(prepared)
    assert torch.equal(output_of(prepared, IDS), plain)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(output_of(bare, IDS), output_of(planted("llama"), IDS))
    optimizer.step()
    assert not torch.equal(output_of(bare, IDS), output_of(planted("llama"), IDS))
