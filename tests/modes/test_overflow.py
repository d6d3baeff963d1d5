"""float16 models whose massive activations overflow: measured in float32, and mended by that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import biassurgery as bs
from biassurgery.errors import LevelOverflow, NonFiniteActivation
from tests import models, vision
from tests.models import CHANNEL, LAYER
from tests.state import output_of, untouched

IDS = models.tokens(rows=2, length=12)
LARGEST = torch.finfo(torch.float16).max
ADVICE = r"float16 ends at 65,504.*measure the model in float32 or bfloat16.*use what is found"


def overflowing() -> Any:
    """A model that writes about 300,000 where `models.planted` writes 3,000, and 900,000."""
    model = models.planted("llama")
    writer: Any = models.blocks(model, "llama")[LAYER].get_submodule("mlp.down_proj")
    with torch.no_grad():
        writer.weight[CHANNEL] *= 100
    return model


VERBS: dict[str, Callable[[Any], Any]] = {
    "calibrate": lambda model: bs.calibrate(model, IDS),
    "detect": lambda model: bs.detect(model, IDS),
    "key values": lambda model: bs.calibrate_key_values(model, IDS),
    "perplexity": lambda model: bs.perplexity(model, IDS),
    "streaming": lambda model: bs.streaming_perplexity(model, IDS[0], DynamicCache()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_refusal_says_what_to_do(verb: str) -> None:
    model = overflowing().half()
    with untouched(model), pytest.raises(NonFiniteActivation, match=ADVICE):
        VERBS[verb](model)


def test_under_autocast() -> None:
    model = overflowing()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(NonFiniteActivation, match=ADVICE),
    ):
        bs.calibrate(model, IDS)


def test_another_dtype_hears_no_word_of_float16() -> None:
    model = overflowing()
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 3]] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NonFiniteActivation, match=r"infinity; look at its inputs, weights"):
            bs.calibrate(model.to(dtype), IDS)


def test_key_values_of_an_overflow_behind_the_start() -> None:
    """The start token's key and value are finite, what the model says of the others is not."""
    model = models.planted("llama")
    writer: Any = models.blocks(model, "llama")[LAYER].get_submodule("mlp.down_proj")
    with torch.no_grad():
        writer.weight[CHANNEL, models.DELIMITER_ID] *= 100
    with pytest.raises(NonFiniteActivation, match=ADVICE):
        bs.calibrate_key_values(model.half(), models.tokens(1, 12, delimiter_at=5))


def test_findings_in_float32_mend_it() -> None:
    """Zero in the place of what overflows: as in float32. Its level itself float16 cannot hold."""
    plain = overflowing()
    sites = bs.calibrate(plain, IDS)
    assert max(abs(site.mean) for site in sites) > LARGEST
    with bs.patched(plain, "set_zero", sites=sites):
        wanted = output_of(plain, IDS)
    model = copy.deepcopy(plain).half()
    assert not output_of(model, IDS).isfinite().all()
    with untouched(model), pytest.raises(LevelOverflow, match=r"float16 ends at 65504"):
        bs.patch_model(model, "set_mean", sites=sites)
    with bs.patched(model, "set_zero", sites=sites):
        mended = output_of(model, IDS)
        assert mended.isfinite().all()
        assert (mended.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    with bs.patched(model, "set_value", sites=sites, value=3000.0):
        assert output_of(model, IDS).isfinite().all()


def test_levels_that_float16_holds_go_from_one_dtype_to_the_other() -> None:
    plain = models.planted("llama")
    sites = bs.calibrate(plain, IDS)
    model = copy.deepcopy(plain).half()
    before = output_of(model, IDS)
    with bs.patched(model, "set_mean", sites=sites):
        assert (output_of(model, IDS) - before).abs().max() < 0.02 * before.abs().max()
    with bs.patched(model, "set_zero", sites=sites):
        assert (output_of(model, IDS) - before).abs().max() > 0.02 * before.abs().max()


def test_images() -> None:
    model: Any = vision.planted("timm_vit").half()
    block = model.blocks[LAYER]
    with torch.no_grad():
        block.mlp.fc2.weight *= 1000
    images = models.images(2).half()
    for verb in (bs.calibrate, bs.detect, bs.calibrate_registers):
        with pytest.raises(NonFiniteActivation, match=ADVICE):
            verb(model, images)
