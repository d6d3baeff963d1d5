"""Batches that are refused before anything is changed, by argument and next step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, NonFiniteActivation
from tests import models
from tests.refusals import IDS, cases, check

PADDED = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}


@cases(
    {
        "no batches": ([], "none"),
        "no batches from a generator": ((x for x in ()), "none"),
        "no rows": ([torch.zeros(0, 5, dtype=torch.long)], r"empty.*\(0, 5\)"),
        "no tokens": (torch.zeros(2, 0, dtype=torch.long), r"empty.*\(2, 0\)"),
        "an empty batch among others": ([IDS, IDS[:0]], "empty"),
        "all padding": (PADDED, "all padding"),
        "all padding in the second batch": ([IDS, PADDED], "all padding"),
        "nothing": (None, "NoneType"),
        "a number": (5, "int"),
        "a text": ("some text", "str"),
        "a list of texts": (["some text"], "str"),
        "a list of None": ([None], "NoneType"),
        "lists of numbers": ([[1, 2, 3]], "list"),
        "an array": ([np.zeros((2, 3), dtype=np.int64)], "ndarray"),
        "an empty dict": ({}, "input_ids"),
        "a dict of something else": ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "input_ids"),
        "ids that are a list": ({"input_ids": [[1, 2]]}, "input_ids"),
        "one dimension": ([IDS[0]], r"\(12,\).*\(B, T\)"),
        "three dimensions": (IDS[None], r"\(1, 2, 12\).*\(B, T\)"),
        "floats": ([IDS.float()], "float32"),
        "embeddings as ids": ([torch.zeros(1, 4, models.HIDDEN)], "inputs_embeds"),
        "images": ([models.images(2)], "float32"),
        "a mask that is too short": (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 11)},
            r"attention_mask.*\(2, 11\)",
        ),
        "a mask for other rows": (
            {"input_ids": IDS, "attention_mask": torch.ones(3, 12)},
            r"attention_mask.*\(3, 12\)",
        ),
        "a mask of four dimensions": (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)},
            r"attention_mask.*\(2, 1, 12, 12\)",
        ),
    }
)
def test_batches_of_text(case):
    batches, pattern = case
    check(models.planted("llama"), lambda model: bs.calibrate(model, batches), BadBatch, pattern)


@cases(
    {
        "no batches": ([], "none"),
        "no images": ([torch.zeros(0, 3, 28, 28)], "empty"),
        "one image without a batch": ([torch.zeros(3, 28, 28)], r"\(3, 28, 28\)"),
        "bytes": ([torch.zeros(1, 3, 28, 28, dtype=torch.uint8)], "uint8"),
        "token ids": ([IDS], "int64"),
        "a dict of something else": ({"input_ids": IDS}, "pixel_values"),
    }
)
def test_batches_of_images(case):
    batches, pattern = case
    check(
        models.planted_vit(),
        lambda model: bs.calibrate(model, batches),
        BadBatch,
        pattern,
        batch=models.images(2),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_hidden_states_that_are_not_finite(family, value):
    model = models.planted_vit() if family == "timm" else models.planted(family)
    batch = models.images(2) if family == "timm" else IDS
    writer: Any = models.blocks(model, family)[3].get_submodule(models.ANATOMY[family][1][1])
    with torch.no_grad():
        writer.weight[0] = value
    check(
        model,
        lambda m: bs.calibrate(m, batch),
        NonFiniteActivation,
        r"block 3 .*NaN or infinity.*inputs, weights",
        batch=batch,
    )


def test_one_bad_value_in_a_later_batch():
    embedded = models.planted("llama").get_input_embeddings()(IDS).detach()
    bad = embedded.clone()
    bad[1, 5, 40] = math.nan
    for batches in ([{"inputs_embeds": embedded}, {"inputs_embeds": bad}],):
        check(
            models.planted("llama"),
            lambda m, b=batches: bs.calibrate(m, b),
            NonFiniteActivation,
            "block 0",
        )
    bad[1, 5] = math.inf
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0  # padding may hold anything
    assert len(
        bs.calibrate(models.planted("llama"), {"inputs_embeds": embedded, "attention_mask": mask})
    )


def test_a_float16_model_that_overflows():
    model = models.planted("llama").half()
    writer: Any = models.blocks(model, "llama")[2].get_submodule("mlp.down_proj")
    with torch.no_grad():
        writer.weight.fill_(60000)
    check(model, lambda m: bs.calibrate(m, IDS), NonFiniteActivation, r"block 2 .*float16 ends")
