"""`pipeline` of transformers on patched models, against loops written out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests.checkpoints import tokenizer
from tests.models import LAYER, planted, tokens

TEXT = packaged_text("evaluation").lower()
PROMPTS = [TEXT[:20], TEXT[100:113], TEXT[200:211]]
STEPS = 6
MODES = ("set_zero", "pin", "attention_bias", "transplant")


def patch(model: Any, mode: str) -> Any:
    """A patch of the mode that is far from nothing."""
    torch.manual_seed(3)
    site = bs.Site(LAYER, 7, "start", -2000.0, gate=100.0)
    options: dict[str, dict[str, Any]] = {
        "set_zero": {"sites": bs.Sites([site])},
        "pin": {"sites": bs.Sites([site])},
        "attention_bias": {"kind": "kv", "std": 1.0},
    }
    if mode == "transplant":
        options[mode] = {"key_values": bs.calibrate_key_values(planted("llama"), tokens())}
    return bs.patch_model(model, mode, **options[mode])


def words(bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that fills up on the left, as generation in batches needs."""
    made = tokenizer(bos)
    made.pad_token = "<unk>"
    made.padding_side = "left"
    return made


@torch.no_grad()
def continued(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy continuation of one row: no cache, no padding, no `generate`."""
    for _ in range(STEPS):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids[:, -STEPS:]


def generated(model: Any, bos: bool, **options: Any) -> list[list[int]]:
    """The tokens that the pipeline adds to the prompts."""
    pipe = pipeline("text-generation", model=model, tokenizer=words(bos), device="cpu")
    given: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    found = pipe(PROMPTS, return_tensors=True, **given, **options)
    return [row[0]["generated_token_ids"][-STEPS:] for row in found]


@pytest.mark.parametrize("mode", MODES)
def test_text_generation(
    mode: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one and in a padded batch: the patch's own continuation, and not the model's."""
    model = planted("llama")
    bos = mode != "transplant"  # which stands for the start token
    wanted = {
        "plain": [continued(model, words(True)(p, return_tensors="pt").input_ids) for p in PROMPTS]
    }
    logger = logging.getLogger("transformers")  # which hands nothing on to the root logger
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    with caplog.at_level(logging.WARNING, logger="transformers"):
        patch(model, mode)
        wanted[mode] = [
            continued(model, words(bos)(p, return_tensors="pt").input_ids) for p in PROMPTS
        ]
        for options in ({}, {"batch_size": 3}):
            assert generated(model, bos, **options) == [row[0].tolist() for row in wanted[mode]]
    assert "not supported" not in caplog.text  # the pipeline knows the model by its class's name
    same = [bool(a.equal(b)) for a, b in zip(wanted["plain"], wanted[mode])]
    assert all(same) if mode == "transplant" else not all(same)
    bs.unpatch_model(model)
    assert generated(model, True) == [row[0].tolist() for row in wanted["plain"]]
