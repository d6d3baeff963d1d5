"""Models of images and text: one tower, the other, or both; each with plain hooks or float64
arithmetic beside it.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from tests.contract.cases import default_dtype_of
from tests.state import output_tensor, untouched

WIDTH = 32
HEADS = 2
LAYERS = 3
VOCAB = 64
LENGTH = 8
SIZE = 28
END = VOCAB - 1  # the highest id ends a text, as CLIP's does


def _transformers(kind: str) -> Any:
    import transformers as tf

    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": 7,
    }
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": END,
        "pad_token_id": 1,
    }
    if kind == "clip":
        return tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**text, "projection_dim": 16},
                vision_config={**vision, "projection_dim": 16},
                projection_dim=16,
            )
        )
    return tf.SiglipModel(
        tf.SiglipConfig(text_config={**text, "projection_size": WIDTH}, vision_config=vision)
    )


def _open_clip(**options: Any) -> Any:
    import open_clip

    kind = open_clip.CustomTextCLIP if options.pop("custom", False) else open_clip.CLIP
    vision = {
        "image_size": SIZE,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": 16,
        "patch_size": 7,
    }
    text = {
        "context_length": LENGTH,
        "vocab_size": VOCAB,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    return kind(embed_dim=16, vision_cfg=vision | options, text_cfg=text | options)


MODELS = {
    "clip": lambda: _transformers("clip"),
    "siglip": lambda: _transformers("siglip"),
    "open_clip": _open_clip,
    "open_clip custom": lambda: _open_clip(custom=True),
    "open_clip sdpa": lambda: _open_clip(custom=True, qk_norm=True),
}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.2 / p.std().clamp(min=0.01))
    return model


def build(name: str) -> Any:
    return copy.deepcopy(_built(name))


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def texts(rows: int = 2) -> Tensor:
    ids = torch.randint(2, END, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    ids[:, -1] = END
    return ids


def pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def seen(model: Any) -> dict[str, Tensor]:
    """The embeddings of images and of texts."""
    if hasattr(model, "encode_image"):
        return {"vision": model.encode_image(images()), "text": model.encode_text(texts())}
    return {
        "vision": pooled(model.get_image_features(pixel_values=images())),
        "text": pooled(model.get_text_features(input_ids=texts())),
    }


def blocks(model: Any, tower: str) -> list[nn.Module]:
    """Found without the library."""
    if hasattr(model, "encode_image"):
        part = model.visual if tower == "vision" else getattr(model, "text", model)
        return list(part.transformer.resblocks)
    part = model.vision_model if tower == "vision" else model.text_model
    return list(part.encoder.layers)


MODES: list[dict[str, Any]] = [
    {"mode": "attention_bias", "kind": "kv", "std": 1.0},
    {"mode": "attention_bias", "kind": "gate", "std": 1.0},
    {"mode": "set_value", "value": 300.0, "channels": 3, "positions": (0, 2), "layers": 1},
]


@every_model
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.get("kind", mode["mode"]))
def test_a_patch_is_on_the_towers_that_it_was_asked_for(name: str, mode: dict[str, Any]) -> None:
    plain = seen(build(name))
    for tower, changed in (
        ("vision", ["vision"]),
        ("text", ["text"]),
        ("both", ["vision", "text"]),
        (None, ["vision"]),
    ):
        model = build(name)
        with untouched(model):
            bs.patch_model(model, **mode, tower=tower)
            found = seen(model)
            assert [each for each in plain if not torch.equal(found[each], plain[each])] == changed
            assert [patch.tower for patch in bs.patches(model)] == changed
            bs.unpatch_model(model)
        assert all(torch.equal(value, plain[each]) for each, value in seen(model).items())


@every_model
@pytest.mark.parametrize(
    "mode",
    [{"mode": "instrument"}, {"mode": "attention_bias", "init": "zero_effect"}],
    ids=lambda m: m["mode"],
)
def test_identity(name: str, mode: dict[str, Any]) -> None:
    model = build(name)
    plain = seen(model)
    with bs.patched(model, **mode, tower="both"):
        for each, value in seen(model).items():
            torch.testing.assert_close(
                value, plain[each], rtol=1e-4, atol=1e-4 * plain[each].abs().max().item()
            )


@every_model
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_bias_is_equation_3(name: str, tower: Any) -> None:
    """What the heads return equals softmax([q K^T, q k'] / sqrt(d)) [V; v'] in float64, on the q,
    k, v that are recorded.
    """
    model = build(name).double()
    bs.patch_model(model, "attention_bias", kind="kv", std=1.0, tower=tower)
    with (
        bs.record(
            model,
            what=("q", "k", "v", "probs", "bias_mass", "value_updates"),
            layers=1,
            tower=tower,
        ) as rec,
        torch.no_grad(),
        default_dtype_of(model),
    ):
        if tower == "vision":
            (
                model.encode_image(images().double())
                if hasattr(model, "encode_image")
                else model.get_image_features(images().double())
            )
        else:
            (
                model.encode_text(texts())
                if hasattr(model, "encode_text")
                else model.get_text_features(texts())
            )
    q, k, v = (rec[part][1] for part in "qkv")
    biases = {
        n.rpartition(".")[2]: p
        for n, p in blocks(model, tower)[1].named_parameters()
        if n.endswith(("k_bias", "v_bias"))
    }
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if tower == "text" and name != "siglip":
        logits = logits.masked_fill(
            ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf
        )
    column = (q * biases["k_bias"][:, None]).sum(-1, keepdim=True) / q.shape[-1] ** 0.5
    probs = torch.cat([logits, column], -1).softmax(-1)
    out = probs[..., :-1] @ v + probs[..., -1:] * biases["v_bias"][:, None]
    torch.testing.assert_close(rec["probs"][1], probs[..., :-1])
    torch.testing.assert_close(rec["bias_mass"][1], probs[..., -1])
    torch.testing.assert_close(rec["value_updates"][1].sum(0), out)
    assert rec["bias_mass"][1].min() > 0


@every_model
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_sites_of_each_tower(name: str, tower: Any) -> None:
    """A value that a plain hook plants in one tower is found there, not in the other, and removed
    by set_zero.
    """
    model = build(name)

    def plant(_: Any, __: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[:, 0, 5] = 1e6
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    blocks(model, tower)[0].register_forward_hook(plant)
    batches = {"vision": images(3), "text": texts(3)}
    found = {each: bs.calibrate(model, batches[each], tower=each) for each in ("vision", "text")}  # type: ignore[arg-type]
    other = "text" if tower == "vision" else "vision"
    assert not found[other].layers()
    assert {(s.channel, s.role) for s in found[tower] if s.layer == 1} == {
        (5, "start" if tower == "text" else host_role(name))
    }
    detected = bs.detect(model, {"input_ids": texts(3), "pixel_values": images(3)}, tower=tower)
    assert {s.channel for s in detected.sites} >= {5}
    plain = seen(model)
    with bs.patched(model, "set_zero", sites=found[tower], layers=[1], tower=tower):
        changed = seen(model)
    assert torch.equal(changed[other], plain[other])
    assert not torch.equal(changed[tower], plain[tower])
    with pytest.raises(bs.IncompatibleSites):
        bs.patch_model(model, "set_zero", sites=found[tower], layers=[1], tower=other)
    with pytest.raises(bs.SurgeryError, match="tower"):
        bs.patch_model(model, "set_zero", sites={tower: found[tower]}, layers=[1], tower="both")
    assert bs.patches(model) == ()


def host_role(name: str) -> str:
    return "patch" if name == "siglip" else "cls"


def test_each_tower_with_its_own_sites() -> None:
    model = build("clip")
    roles = {"vision": "patch", "text": "start"}
    sites: Any = {
        tower: bs.Sites([bs.Site(1, 4, role, mean=50.0, gate=0.01)])
        for tower, role in roles.items()
    }
    plain = seen(model)
    bs.patch_model(model, "set_value", value=50.0, sites=sites, tower="both")
    assert [(patch.tower, patch.order) for patch in bs.patches(model)] == [
        ("vision", 0),
        ("text", 1),
    ]
    assert all(not torch.equal(value, plain[each]) for each, value in seen(model).items())


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


@pytest.mark.parametrize("tower", ["text", "both", "left"])
def test_a_tower_that_is_not_there(tower: Any) -> None:
    import transformers as tf

    model = tf.CLIPVisionModel(
        tf.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=7,
        )
    )
    with (
        untouched(model),
        pytest.raises(
            bs.BadOption, match=f"tower: .*'{'text' if tower == 'both' else tower}'.*has 'vision'"
        ),
    ):
        bs.patch_model(model, "instrument", tower=tower)
    with pytest.raises(bs.BadOption, match="one at a time"):
        bs.calibrate(build("clip"), images(), tower="both")  # type: ignore[arg-type]
    assert bs.patch_model(model, "instrument", tower="vision") is model


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


def test_padding_behind_the_end_of_a_text_is_not_measured() -> None:
    """open_clip's texts end in zeros behind the highest id."""
    model = build("open_clip")
    ids = texts(2)
    ids[:, 4] = END
    ids[:, 5:] = 0
    found = bs.detect(model, ids, tower="text")
    assert found.tokens == 2 * 5


def test_batch_first_both_ways() -> None:
    """A tower that keeps (T, B, D) inside computes and is patched as one that keeps (B, T, D)."""
    from open_clip.transformer import VisionTransformer

    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=SIZE,
            patch_size=7,
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            mlp_ratio=2,
            output_dim=5,
        )
        model.transformer.batch_first = batch_first
        for block in model.transformer.resblocks:
            block.attn.batch_first = batch_first
        bs.patch_model(model.eval(), "attention_bias", kind="gate", std=1.0)
        bs.patch_model(model, "attention_bias", kind="kv", std=1.0)
        bs.patch_model(model, "set_value", value=30.0, channels=3, positions=(0, 2), layers=1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "attention_bias" in name:
                    p.normal_(generator=generator)
        with (
            bs.record(
                model,
                what=("block_input", "block_output", "norm_output", "attention_output", "probs"),
            ) as rec,
            torch.no_grad(),
        ):
            found.append((model(images(3)), {name: rec[name][1] for name in rec}))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1]["block_output"].shape == (3, 17, WIDTH)


def test_timm_inside_open_clip() -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(
        embed_dim=16,
        vision_cfg={
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        text_cfg={
            "context_length": LENGTH,
            "vocab_size": VOCAB,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    ).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = model.encode_image(pixels)
        with (
            bs.patched(model, "attention_bias", std=1.0),
            bs.record(model, what="probs", layers=0) as rec,
        ):
            assert not torch.equal(model.encode_image(pixels), plain)
        assert rec["probs"][0].shape == (2, 3, 197, 197)
        assert torch.equal(model.encode_image(pixels), plain)


def test_attention_output_is_what_joins_the_residual_stream() -> None:
    """Also where, as in transformers 4, the projection is beside the attention."""
    from tests import vision

    for family in ("vit", "dinov2", "clip_vision", "open_clip_vision", "hub_dinov2"):
        model = vision.planted(family)
        kept = dict[str, Tensor]()
        projection = vision.attentions(model, family)[1][1]
        if family != "open_clip_vision":  # which does not call its projection
            projection.register_forward_hook(
                lambda _, __, output, kept=kept: kept.update(output=output)
            )
        with bs.record(model, what=("attention_output", "q"), layers=1) as rec, torch.no_grad():
            model(images(2))
        if kept:
            assert torch.equal(rec["attention_output"][1], kept["output"]), family
        assert rec["attention_output"][1].shape == (2, rec["q"][1].shape[2], 64)
