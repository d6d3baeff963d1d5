"""Patches of models of two towers, saved, loaded and trained."""

from __future__ import annotations

from pathlib import Path

import torch

import biassurgery as bs
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
