"""What all verbs that read data have in common: `progress=`; and `checkpoint=` where it is long."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests import models
from tests.state import output_of

CHECKPOINTED = ("calibrate", "detect", "calibrate_key_values", "calibrate_registers", "perplexity")
OTHERS = ("cls_attention", "find_register_neurons", "top1_accuracy")


def verb(name: str) -> Any:
    return getattr(bs, name, None) or getattr(bs.evaluate, name)


@pytest.mark.parametrize("name", CHECKPOINTED + OTHERS)
def test_they_take_the_same_options(name: str) -> None:
    parameters = inspect.signature(verb(name)).parameters
    assert parameters["progress"].default is None
    assert parameters["progress"].kind is inspect.Parameter.KEYWORD_ONLY
    if name in CHECKPOINTED:
        assert parameters["checkpoint"].default is None
        assert parameters["checkpoint"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", ["calibrate", "detect", "calibrate_key_values", "perplexity"])
def test_progress_is_shown_and_a_checkpoint_written_where_asked_for(
    name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.planted("llama")
    batches = [models.tokens(rows=2), models.tokens(rows=2, seed=5)]
    file = tmp_path / "checkpoint"
    verb(name)(model, batches, progress=False)
    assert "batch" not in capsys.readouterr().err
    verb(name)(model, batches, progress=True, checkpoint=file)
    assert "2batch" in capsys.readouterr().err.replace(" ", "")
    assert file.is_file()


def test_the_bar_of_cls_attention(capsys: pytest.CaptureFixture[str]) -> None:
    model = models.planted_vit()
    images = models.images(4)
    quiet = bs.cls_attention(model, images.split(2), progress=False)
    assert capsys.readouterr().err == ""
    assert torch.equal(bs.cls_attention(model, images.split(2), progress=True), quiet)
    assert "attention of [CLS]: 2batch" in capsys.readouterr().err


def test_heads_that_were_pruned_after_the_patch_are_named() -> None:
    model = models.planted("llama")
    with bs.patched(model, "attention_bias", kind="kv"):
        attention = model.model.layers[1].self_attn
        heads = attention.attention_bias_kv.k_bias.shape[0]
        with torch.no_grad():
            kept = torch.nn.Parameter(attention.attention_bias_kv.k_bias[: heads - 1])
        attention.attention_bias_kv.k_bias = kept
        with pytest.raises(UnsupportedModel, match="prune heads before you patch"):
            output_of(model, models.tokens(rows=2))
