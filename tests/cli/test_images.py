"""Commands on models of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import biassurgery as bs
from tests import vision
from tests.cli.running import CPU, run, run_json
from tests.models import CHANNEL, IMAGE, LAYER
from tests.photographs import paint, write_table


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A random timm model and a few labelled images."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images")
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    for shade in range(6):
        paint(folder / f"{shade}.png", 40 * shade)
    write_table(folder, [{"file": f"{shade}.png", "class_index": shade} for shade in range(6)])
    return "test_vit", "--weights", folder / "vit.safetensors", "--images", folder, *CPU


def test_images(sample: tuple[object, ...], tmp_path: Path) -> None:
    found = run_json("detect", *sample, "--split", "odd", "--max-images", 2, "--batch-size", 1)
    assert found["data"] == {"source": str(sample[4]), "images": 2, "split": "odd"}
    assert found["origin"]["roles"][-1] == "patch"
    low = ("--min-magnitude", 0, "--min-ratio", 3, "--sites", tmp_path / "sites.safetensors")
    assert len(run_json("calibrate", *sample, *low)["sites"]) > 0
    results = run_json("eval", *sample, "--sites", low[-1], "--mode", "set_zero")["results"]
    assert [row["mode"] for row in results] == ["original", "set_zero"]
    assert all(row["top1"] * 6 == pytest.approx(round(row["top1"] * 6)) for row in results)


def test_image_models_of_transformers(tmp_path: Path) -> None:
    """A folder with a classifier and its image processor: the same numbers as with the library."""
    import transformers as tf

    model = vision.planted("vit")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor: Any = tf.ViTImageProcessor(size={"height": IMAGE, "width": IMAGE})
    processor.save_pretrained(folder)
    for shade in range(4):
        paint(tmp_path / f"{shade}.png", 60 * shade)
    write_table(
        tmp_path, [{"file": f"{shade}.png", "class_index": shade % 2} for shade in range(4)]
    )
    pixels = torch.stack(
        [
            processor(images=Image.open(tmp_path / f"{shade}.png"), return_tensors="pt")[
                "pixel_values"
            ][0]
            for shade in range(4)
        ]
    )

    found = run_json("detect", folder, "--images", tmp_path, *CPU)
    wanted = bs.detect(model, pixels, progress=False)
    assert [layer["median"] for layer in found["layers"]] == pytest.approx(
        [layer.median for layer in wanted.layers]
    )
    assert (LAYER, CHANNEL) in {(site["layer"], site["channel"]) for site in found["sites"]}
    assert run_json("detect", folder, *CPU)["data"]["source"].startswith("packaged photographs")

    saved = tmp_path / "sites.safetensors"
    run_json("calibrate", folder, "--images", tmp_path, *CPU, "--sites", saved)
    results = run_json(
        "eval", folder, "--images", tmp_path, *CPU, "--sites", saved, "--mode", "set_zero"
    )["results"]
    labels = torch.tensor([0, 1, 0, 1])
    assert results[0]["top1"] == bs.top1_accuracy(model, [(pixels, labels)])
    with bs.patched(model, "set_zero", sites=bs.Sites.load(saved)):
        assert results[1]["top1"] == bs.top1_accuracy(model, [(pixels, labels)])


def test_images_refuse_what_is_for_text(sample: tuple[object, ...]) -> None:
    assert "reads images; give --images" in run("detect", *sample, "--bos", "no", code=1).stderr
    assert "reads images; give --images" in run("detect", *sample, "--length", 8, code=1).stderr


def test_accuracy_needs_labels(sample: tuple[object, ...], tmp_path: Path) -> None:

    paint(tmp_path / "a.png", 9)
    result = run(
        "eval", *sample[:3], "--images", tmp_path, "--sites", "absent.safetensors", *CPU, code=1
    )
    assert "absent.safetensors" in result.stderr
    bs.Sites([bs.Site(0, 0, "patch", 1.0)]).save(tmp_path / "sites.safetensors")
    result = run(
        "eval",
        *sample[:3],
        "--images",
        tmp_path,
        "--sites",
        tmp_path / "sites.safetensors",
        *CPU,
        code=1,
    )
    assert "top-1 accuracy needs labels" in result.stderr
    assert "1000 classes" in result.stderr
