"""What a stranger found in vision models, kept from coming back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from tests import vision
from tests.adapters.test_towers import build, seen, texts
from tests.models import HIDDEN, LAYER, images
from tests.state import output_of, untouched


def neurons(model: Any, family: str = "timm_vit") -> bs.RegisterNeurons:
    return bs.find_register_neurons(
        vision.planted(family) if model is None else model, images(4), count=2
    )


def test_backbones_take_no_test_time_register() -> None:
    """They reshape what their blocks return, the added token with it."""
    import transformers as tf

    model = tf.Dinov2Backbone(
        tf.Dinov2Config(
            hidden_size=HIDDEN,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            mlp_ratio=2,
            out_features=["stage2", "stage3"],
        )
    ).eval()
    model.load_state_dict(
        {
            name.removeprefix("dinov2."): p
            for name, p in vision.planted("dinov2").state_dict().items()
        },
        strict=False,
    )
    found = neurons(model)
    with untouched(model), pytest.raises(bs.UnsupportedModel, match="Dinov2Backbone"):
        bs.patch_model(model, "test_time_registers", neurons=found)
    with bs.patched(model, "set_zero", sites=bs.calibrate(model, images(4))), torch.no_grad():
        assert [tuple(each.shape) for each in model(images(2)).feature_maps] == [
            (2, HIDDEN, 4, 4)
        ] * 2


def test_an_added_token_does_not_leave_from_under_what_counts_it() -> None:
    model = vision.planted("timm_vit")
    found = neurons(None)
    bs.patch_model(model, "test_time_registers", neurons=found)
    means = bs.calibrate_registers(model, images(4))
    assert means.values.shape[1] == 3  # two of its own, one that was added
    bs.patch_model(model, "fix_registers", means=means)
    patched = output_of(model, images(2))
    with pytest.raises(bs.BadOption, match=r"'fix_registers'.*unpatch_model"):
        bs.unpatch_model(model, "test_time_registers")
    assert torch.equal(output_of(model, images(2)), patched)
    bs.unpatch_model(model, "fix_registers")
    bs.unpatch_model(model, "test_time_registers")
    assert torch.equal(
        output_of(model, images(2)), output_of(vision.planted("timm_vit"), images(2))
    )


def test_all_at_once_leave_together() -> None:
    model = vision.planted("timm_vit")
    with untouched(model, images(2)):
        bs.patch_model(model, "test_time_registers", neurons=neurons(None))
        bs.patch_model(model, "fix_registers", fill="zero")
        bs.unpatch_model(model)


def test_an_added_token_does_not_move_what_is_written_by_position() -> None:
    model = vision.planted("timm_vit")
    bs.patch_model(model, "set_value", value=1.0, channels=2, positions=7, layers=1)
    with untouched(model), pytest.raises(bs.BadOption, match="set_value"):
        bs.patch_model(model, "test_time_registers", neurons=neurons(None))
    bs.unpatch_model(model)
    bs.patch_model(
        model, "set_value", value=1.0, channels=2, positions=1, layers=1
    )  # a register stays where it is
    assert bs.patch_model(model, "test_time_registers", neurons=neurons(None)) is model


def test_instrument_is_the_identity_beside_a_lora_that_torch_does_not_see() -> None:
    """nn.MultiheadAttention reads the weight of its output projection and does not call it."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False, r=2)
    model: Any = peft.get_peft_model(vision.planted("open_clip_vision"), config).eval()
    plain = output_of(model, images(2))
    bs.patch_model(model, "instrument")
    torch.testing.assert_close(output_of(model, images(2)), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["timm_vit", "hub_dinov2", "open_clip_vision"])
def test_what_a_model_does_not_take_is_not_dropped(family: str) -> None:
    with pytest.raises(bs.BadBatch, match="interpolate_pos_encoding"):
        bs.calibrate(
            vision.planted(family), {"pixel_values": images(2), "interpolate_pos_encoding": True}
        )


def test_what_it_takes_gets_there() -> None:
    model = vision.planted("timm_vit")
    seen: list[Any] = []
    model.blocks[0].attn.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["attn_mask"]), with_kwargs=True
    )
    mask = torch.zeros(19, 19)
    bs.calibrate(model, {"pixel_values": images(2), "attn_mask": mask})
    assert torch.equal(seen[0], mask)


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
    with pytest.raises(bs.IncompatibleSites, match=f"clip_{other}_model"):
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


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_the_last_layer_of_a_gated_mlp(kind: str) -> None:
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        use_swiglu_ffn=True,
    )
    host = find_host(getattr(tf, f"{kind}Model")(config))
    last: Any = host.adapter.mlp_out(host.model, host.blocks[0])  # type: ignore[attr-defined]
    assert last.out_features == 32
    assert last.in_features > 32


def test_naflex_calibrates_on_the_packaged_photographs() -> None:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    model = NaFlexVit(NaFlexVitCfg(patch_size=16, embed_dim=32, depth=2, num_heads=2)).eval()
    with pytest.warns(UserWarning, match="packaged photographs"), pytest.raises(bs.NoSites):
        bs.patch_model(model, "set_zero")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_patches_that_are_not_square(library: str) -> None:
    import transformers as tf
    from timm.models.vision_transformer import VisionTransformer

    if library == "timm":
        model: Any = VisionTransformer(
            img_size=(64, 32), patch_size=(16, 4), embed_dim=32, depth=2, num_heads=2
        )  # type: ignore[arg-type]
    else:
        model = tf.ViTModel(
            tf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=(64, 32),
                patch_size=(16, 4),
            )
        )
    assert bs.detect(model, torch.randn(1, 3, 64, 32)).grid == (4, 8)


def test_encoders_that_see_both_ways_are_not_taken_for_causal_ones() -> None:
    import transformers as tf

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    for model, causal in (
        (tf.BertModel(tf.BertConfig(**sizes)), False),
        (tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), True),
    ):
        host = find_host(model)
        assert host.adapter.causal(host.model) is causal


def test_two_towers_that_no_adapter_knows_are_refused() -> None:
    import transformers as tf

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    image = {**text, "image_size": 28, "patch_size": 7}
    del image["vocab_size"]
    model = tf.BlipModel(
        tf.BlipConfig(text_config={**text, "encoder_hidden_size": 32}, vision_config=image)
    )
    with pytest.raises(bs.UnsupportedModel, match="tower"):
        bs.patch_model(model, "attention_bias")


def test_registers_that_the_dtype_cannot_hold_are_an_error_after_a_cast_too() -> None:
    model = vision.planted("timm_vit")
    bs.patch_model(model, "fix_registers", means=bs.RegisterMeans(torch.full((5, 2, HIDDEN), 1e5)))
    with pytest.raises(bs.LevelOverflow, match="float16"):
        model.half()(images(2).half())


def test_sites_of_towers_need_a_tower() -> None:
    site: Tensor | Any = bs.Sites([bs.Site(LAYER, 4, "patch", mean=50.0)])
    with pytest.raises(bs.BadOption, match="tower='both'"):
        bs.patch_model(build("clip"), "set_mean", sites={"vision": site, "text": site})
    assert len(texts()) == 2
