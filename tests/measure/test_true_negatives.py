"""Really trained small models without massive activations: nothing is found, nothing is patched,
and perplexity is a plain loop's.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import NoSites

WEIGHTS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "weights"
NAMES = {"gpt_nano_sort_hf": (3, 11), "stories260K_hf": (512, 64)}  # vocabulary, tokens a sequence
pytestmark = pytest.mark.skipif(
    not WEIGHTS.is_dir(),
    reason="the folder `shared` beside the repository, with trained weights, is absent",
)


@pytest.fixture(params=NAMES)
def trained(request):
    from transformers import AutoModelForCausalLM

    vocabulary, length = NAMES[request.param]
    model = AutoModelForCausalLM.from_pretrained(
        WEIGHTS / request.param, dtype=torch.float32
    ).eval()
    return model, torch.randint(
        0, vocabulary, (12, length), generator=torch.Generator().manual_seed(0)
    )


def test_nothing_is_found_and_a_patch_is_refused(trained):
    model, ids = trained
    sites = bs.calibrate(model, [ids])
    assert len(sites) == 0
    assert max(layer.ratio for layer in bs.detect(model, [ids]).layers) < 1000
    before = model(ids).logits
    for mode in ("set_mean", "set_zero"):
        with pytest.raises(NoSites, match="min_ratio"):
            bs.patch_model(model, mode, sites=sites)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_perplexity_is_a_plain_loop(trained):
    model, ids = trained
    total = count = 0
    for row in ids:
        for at in range(1, len(row)):
            logits = model(row[None, :at], use_cache=False).logits[0, -1].double()
            total = total + (logits.logsumexp(0) - logits[row[at]]).item()
            count = count + 1
    assert bs.perplexity(model, [ids]) == pytest.approx(math.exp(total / count), rel=1e-6)
    assert bs.perplexity(model, ids.flatten(), length=ids.shape[1]) == pytest.approx(
        math.exp(total / count), rel=1e-6
    )
