"""Patches of models of two towers, saved, loaded and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.errors import Incompatible
from tests.adapters.towers import build, every_model, images, seen
from tests.state import output_tensor


@every_model
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = build(name)
    bs.patch_model(model, "attention_bias", std=1.0, tower="both")
    bs.patch_model(model, "set_value", value=9.0, channels=1, positions=1, layers=2, tower="text")
    bs.save_patch(model, tmp_path)
    fresh = bs.load_patch(build(name), tmp_path)
    wanted = seen(model)
    assert all(torch.equal(value, wanted[each]) for each, value in seen(fresh).items())
    assert [p.tower for p in bs.patches(fresh)] == ["vision", "text", "text"]


def test_training_the_biases_of_both_towers_only() -> None:
    model = build("open_clip")
    bs.patch_model(model, "attention_bias", trainable="bias", tower="both")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "k_bias",
        "v_bias",
    }
    bs.unpatch_model(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_vision_patch_of_two_towers_fits_the_vision_model_alone(tmp_path: Path) -> None:
    whole = build("clip")
    bs.patch_model(whole, "attention_bias", std=1.0)
    bs.save_patch(whole, tmp_path)
    import transformers as tf

    alone = tf.CLIPVisionModel(whole.config.vision_config).eval()
    alone.load_state_dict(
        {
            name.removeprefix("vision_model."): p
            for name, p in build("clip").state_dict().items()
            if name.startswith("vision_model.")
        }
        if hasattr(alone, "encoder")
        else {
            name: p
            for name, p in build("clip").state_dict().items()
            if name.startswith("vision_model.")
        }
    )
    bs.load_patch(alone, tmp_path)
    with torch.no_grad():
        hidden = output_tensor(alone(images()))
        part = whole.vision_model(images())
    assert torch.equal(hidden, output_tensor(part))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_patches_of_a_tower_fit_the_tower_alone_and_back(tower: Any, tmp_path: Path) -> None:
    import transformers as tf

    whole = build("clip")
    kind, config = (
        (tf.CLIPVisionModel, whole.config.vision_config)
        if tower == "vision"
        else (tf.CLIPTextModel, whole.config.text_config)
    )
    alone = kind(config).eval()
    bs.patch_model(whole, "attention_bias", std=1.0, tower=tower)
    bs.save_patch(whole, tmp_path / "whole")
    bs.load_patch(alone, tmp_path / "whole")
    bs.save_patch(alone, tmp_path / "alone")
    back = bs.load_patch(build("clip"), tmp_path / "alone")
    assert all(torch.equal(value, seen(whole)[each]) for each, value in seen(back).items())
    other = "text" if tower == "vision" else "vision"
    bs.unpatch_model(whole)
    bs.patch_model(whole, "instrument", tower=other)
    bs.save_patch(whole, tmp_path / "other")
    with pytest.raises(Incompatible, match=f"clip_{other}_model"):
        bs.load_patch(alone, tmp_path / "other")


def test_biases_of_both_towers_train_alone_and_are_saved(tmp_path: Path) -> None:
    def trained(model: nn.Module) -> set[str]:
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    model = build("clip")
    everything = trained(model)
    bs.patch_model(model, "attention_bias", tower="both", trainable="bias")
    bs.save_patch(model, tmp_path)
    fresh = bs.load_patch(build("clip"), tmp_path)
    assert trained(fresh) == trained(model) == {"k_bias", "v_bias"}
    assert all(torch.equal(value, seen(model)[each]) for each, value in seen(fresh).items())
    bs.unpatch_model(fresh)
    assert trained(fresh) == everything
    one_by_one = build("clip")
    with bs.patched(one_by_one, "attention_bias", kind="kv", tower="vision", trainable="bias"):
        with bs.patched(one_by_one, "attention_bias", kind="v", tower="text", trainable="bias"):
            assert len([p for p in one_by_one.parameters() if p.requires_grad]) == 3 * 2 + 3
        assert trained(one_by_one) == {"k_bias", "v_bias"}
    assert trained(one_by_one) == everything
