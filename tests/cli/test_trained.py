"""Commands on trained models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CPU, run, run_json

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg" / "vit_tiny_patch16_224.safetensors"
IMAGES = SHARED / "images" / "imagenet_sample_200"
STORIES = SHARED / "weights" / "stories260K_hf"
ABSENT = "the folder `shared` beside the repository, with trained weights and images, is absent"


@pytest.mark.long
@pytest.mark.skipif(not (VIT.is_file() and IMAGES.is_dir()), reason=ABSENT)
def test_a_trained_vision_transformer(tmp_path: Path) -> None:
    common = ("vit_tiny_patch16_224", "--weights", VIT, "--images", IMAGES, *CPU)
    saved = run_json(
        "calibrate", *common, "--split", "even", "--sites", tmp_path / "sites.safetensors"
    )
    first = saved["sites"][0]
    assert (first["layer"], first["channel"], first["role"]) == (7, 41, "patch")
    assert {site["channel"] for site in saved["sites"]} == {41}
    assert first["mean"] == pytest.approx(-471, abs=20)
    assert first["count"] == pytest.approx(400, abs=8)  # the four corners of 100 images

    found = run_json("eval", *common, "--split", "odd", "--sites", tmp_path / "sites.safetensors")
    top1 = {row["mode"]: row["top1"] for row in found["results"]}
    assert found["data"]["images"] == 100
    assert top1["original"] == pytest.approx(0.86, abs=0.011)
    assert top1["set_zero"] == pytest.approx(0.68, abs=0.021)
    assert top1["set_mean"] == pytest.approx(top1["original"], abs=0.011)
    assert top1["zero_random"] == pytest.approx(top1["original"], abs=0.011)


@pytest.mark.skipif(not VIT.is_file(), reason=ABSENT)
def test_detection_names_block_and_channel_from_packaged_photographs() -> None:
    found = run_json("detect", "vit_tiny_patch16_224", "--weights", VIT, *CPU)
    assert found["data"]["source"].startswith("packaged photographs")
    assert {(site["layer"], site["channel"]) for site in found["sites"]} >= {(7, 41)}
    assert [layer["layer"] for layer in found["layers"] if layer["top"][0] > 200] == [
        7,
        8,
        9,
        10,
        11,
    ]


@pytest.mark.skipif(not STORIES.is_dir(), reason=ABSENT)
def test_a_trained_language_model_without_massive_activations(tmp_path: Path) -> None:
    options = (
        STORIES,
        "--text",
        SHARED / "text" / "tinystories_200k.txt",
        "--max-windows",
        4,
        "--length",
        128,
        *CPU,
    )
    assert run_json("calibrate", *options, "--sites", tmp_path / "sites.safetensors")["sites"] == []
    result = run("eval", *options, "--sites", tmp_path / "sites.safetensors", code=1)
    assert "there is nothing to change, for the sites are empty" in result.stderr
