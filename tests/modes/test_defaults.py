"""`patch_model` without sites: published ones, else a calibration on packaged text or images, else
a message that shows the call.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import biassurgery as bs
from biassurgery.data.packaged import (
    packaged_images,
    packaged_pixels,
    packaged_text,
    special_prefix,
    text_batches,
)
from biassurgery.errors import CalibrationRequired
from biassurgery.measure.briefly import LEAST
from tests.checkpoints import checkpoint, tokenizer
from tests.models import (
    CHANNEL,
    DELIMITER,
    LAYER,
    PATCHES,
    START,
    VOCAB,
    planted,
    planted_vit,
    tokens,
)

REPOSITORY = Path(__file__).resolve().parents[2]
VIT_TINY = REPOSITORY / ".." / "shared" / "data" / "weights" / "vit_tiny_augreg"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def by_role(sites: bs.Sites) -> dict[str, bs.Site]:
    return {site.role: site for site in sites.at(LAYER)}


@pytest.mark.parametrize("bos", [True, False])
def test_text_with_the_checkpoints_own_tokenizer(tmp_path: Path, bos: bool) -> None:
    model = checkpoint(tmp_path, bos)
    with pytest.warns(
        UserWarning, match=f"packaged public-domain English.*{'with' if bos else 'without'} BOS"
    ) as caught:
        bs.patch_model(model, "set_mean")
    ours = [w for w in caught if "sites: none were given" in str(w.message)]
    assert [w.filename for w in ours] == [__file__]
    (patch,) = bs.patches(model)
    sites = by_role(patch.sites)
    assert patch.layers == (LAYER,)
    assert {site.channel for site in sites.values()} == {CHANNEL}
    assert str(tmp_path) in patch.sites.origin.source
    if bos:
        assert sites["start"].mean == pytest.approx(START, rel=0.01)
        # Constant values are known from the least number of tokens, and the origin says how many.
        read = sites["start"].count
        assert LEAST <= 64 * read < LEAST + 64 * 32 * 2 < 64 * packaged_sequences(length=64)
        said = f"with BOS, {read} sequences of 64 tokens, {64 * read:,} in all"
        assert patch.sites.origin.source.endswith(said)
    else:
        assert "start" not in sites or sites["start"].mean == pytest.approx(
            DELIMITER, rel=0.3
        )  # a text window may start with a stop
    assert sites["elsewhere"].mean == pytest.approx(DELIMITER, rel=0.3)


def packaged_sequences(length: int) -> int:
    """How many windows of `length` with a start token fit, at one token a character."""
    return len(packaged_text("calibration")) // (length - 1)


def test_a_cached_checkpoint_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--nobody--tiny" / "snapshots" / "abc"
    model = checkpoint(snapshot, bos=True)
    (tmp_path / "models--nobody--tiny" / "refs").mkdir()
    (tmp_path / "models--nobody--tiny" / "refs" / "main").write_text("abc")
    model.config._name_or_path = "nobody/tiny"
    with pytest.warns(UserWarning, match="tokenizer of nobody/tiny with BOS"):
        bs.patch_model(model, "set_mean")
    assert by_role(bs.patches(model)[0].sites)["start"].mean == pytest.approx(START, rel=0.01)


def test_zero_then_undone(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, bos=True)
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
        with pytest.warns(UserWarning, match="none were given"):
            bs.patch_model(model, "set_zero")
        assert (model(ids).logits - before).abs().max() > 0.1
        bs.unpatch_model(model)
        assert torch.equal(model(ids).logits, before)


def test_text_batches_hold_every_token_once_behind_the_prefix() -> None:
    text = packaged_text("calibration")[:1000]
    plain = tokenizer(bos=False)
    prefixed = tokenizer(bos=True)
    assert (special_prefix(plain), special_prefix(prefixed)) == ([], [0])
    ids = plain(text)["input_ids"]
    assert len(ids) == 1000
    batches = text_batches(prefixed, text, length=33)
    whole = torch.cat(batches)
    assert whole.shape == (1000 // 32, 33)
    assert whole.dtype == torch.int64
    assert (whole[:, 0] == 0).all()
    assert whole[:, 1:].flatten().tolist() == ids[: 1000 // 32 * 32]
    assert torch.cat(text_batches(plain, text, length=40)).flatten().tolist() == ids


def gpt2(name: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=768,
        n_layer=4,
        n_head=12,
        vocab_size=100,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.bias[447] = 2000.0
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2"])
def test_published_sites_of_a_known_name(name: str) -> None:
    model = gpt2(name)
    with pytest.warns(UserWarning, match=r"arXiv 2503\.22329, openai-community/gpt2 without BOS"):
        bs.patch_model(model, "set_mean")
    (patch,) = bs.patches(model)
    assert [(site.layer, site.channel, site.role, site.mean) for site in patch.sites] == [
        (2, 447, "start", 2479.2)
    ]
    assert patch.layers == (2,)


@pytest.mark.parametrize(("bos", "level"), [(True, 2480.0), (False, 2479.2)])
def test_published_sites_match_the_local_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: bool, level: float
) -> None:
    tokenizer(bos).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    model = gpt2("gpt2")
    with pytest.warns(UserWarning, match=f"gpt2 {'with' if bos else 'without'} BOS"):
        bs.patch_model(model, "set_mean")
    assert [site.mean for site in bs.patches(model)[0].sites] == [level]


def test_a_known_checkpoint_without_massive_activations_is_refused() -> None:
    model = planted("llama")
    model.config._name_or_path = "allenai/OLMo-2-1124-7B"
    with (
        pytest.warns(UserWarning, match="OLMo-2"),
        pytest.raises(bs.SurgeryError, match=r"OLMo-2|olmo2"),
    ):
        bs.patch_model(model, "set_mean")
    assert bs.patches(model) == ()


@pytest.mark.parametrize("name", ["", "nobody/nothing", "/no/such/folder"])
def test_no_tokenizer_asks_for_calibration(name: str) -> None:
    model = planted("llama")
    model.config._name_or_path = name
    with pytest.raises(
        CalibrationRequired,
        match=r"(?s)sites: none were given.*calibrate\(model, batches\).*input_ids",
    ):
        bs.patch_model(model, "set_mean")
    assert bs.patches(model) == ()


def test_a_folder_without_tokenizer_files_asks_for_calibration(tmp_path: Path) -> None:
    planted("gpt2").save_pretrained(tmp_path)  # transformers 5 makes up an empty tokenizer here
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CalibrationRequired, match="no tokenizer"):
        bs.patch_model(model, "set_mean")


def test_a_tokenizer_of_another_vocabulary_asks_for_calibration(tmp_path: Path) -> None:
    model = planted("llama")
    tokenizer(bos=True, size=VOCAB + 5).save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(
        CalibrationRequired, match=f"makes token {VOCAB + 4}, but the model has {VOCAB}"
    ):
        bs.patch_model(model, "set_mean")


def test_given_sites_need_no_defaults(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = checkpoint(tmp_path, bos=True)
    bs.patch_model(model, "set_mean", sites=bs.calibrate(model, [tokens()]))
    assert not [w for w in recwarn if "none were given" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_at_the_models_own_size(dtype: torch.dtype) -> None:
    model = planted_vit(dtype)
    seen = []
    hook = model.blocks[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(out[:, 1:][:, list(PATCHES), CHANNEL])
    )
    with torch.no_grad():
        model(packaged_pixels(model))
    hook.remove()
    with pytest.warns(UserWarning, match="packaged photographs, 24 crops and flips of 3, 28 x 28"):
        bs.patch_model(model, "set_mean")
    (patch,) = bs.patches(model)
    assert patch.layers == (LAYER,)
    (site,) = patch.sites
    assert (site.channel, site.role, site.count) == (CHANNEL, "patch", 24 * len(PATCHES))
    assert site.mean == pytest.approx(seen[0].double().mean().item(), rel=1e-3)


def test_images_of_another_number_of_channels_ask_for_calibration() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, embed_dim=16, depth=2, num_heads=2
    )
    with pytest.raises(
        CalibrationRequired, match=r"(?s)images of 1 channels.*pixel_values: \(B, 1, H, W\)"
    ):
        bs.patch_model(model, "set_mean")


@pytest.mark.skipif(
    not VIT_TINY.is_dir(),
    reason="the folder `shared` beside the repository, with trained weights, is absent",
)
def test_a_trained_vit_is_calibrated_on_the_packaged_photographs() -> None:
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("vit_tiny_patch16_224").eval()
    (weights,) = VIT_TINY.glob("*.safetensors")
    model.load_state_dict(load_file(weights))
    with pytest.warns(UserWarning, match="packaged photographs"):
        bs.patch_model(model, "set_mean")
    (patch,) = bs.patches(model)
    (site,) = patch.sites
    assert (site.layer, site.channel, site.role) == (7, 41, "patch")
    assert site.mean == pytest.approx(
        -471, abs=91
    )  # mean and standard deviation measured on 500 ImageNet images


def test_packaged_text() -> None:
    calibration = packaged_text("calibration")
    evaluation = packaged_text("evaluation")
    for text in (calibration, evaluation):
        assert 55_000 < len(text.encode()) < 65_000
        assert not [
            word
            for word in ("gutenberg", "produced by", "transcriber", "http")
            if word in text.lower()
        ]
    lines = {line for line in calibration.splitlines() if len(line) > 40}
    assert not lines & set(evaluation.splitlines())


def test_packaged_images() -> None:
    images = packaged_images()
    assert [image.size for image in images] == [(512, 341)] * 3
    assert {image.mode for image in images} == {"RGB"}
