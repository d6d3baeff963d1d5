"""Register means: files, sums, and those that Sun et al. 2024 published."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import FileError, Incompatible
from biassurgery.modes import FixRegisters
from tests.findings.register_means import means

MEANS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "dinov2_reg_means"
ABSENT = "the folder `shared` beside the repository, with the published register means, is absent"
published = pytest.mark.skipif(not MEANS.is_dir(), reason=ABSENT)
SIZES = {
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "giant": (40, 1536, 24),
}


def test_save_and_load(tmp_path: Path) -> None:
    for number, given in enumerate(
        (means(), means(std=None, cls=None, count=0, architecture=None))
    ):
        given.save(tmp_path / f"{number}.safetensors")
        found = bs.RegisterMeans.load(tmp_path / f"{number}.safetensors")
        for name in ("values", "std", "cls"):
            a = getattr(given, name)
            b = getattr(found, name)
            assert (a is None and b is None) or torch.equal(a, b)
        assert (found.count, found.architecture) == (given.count, given.architecture)


def test_the_papers_format(tmp_path: Path) -> None:
    """A dict layer -> (registers, channels), in any order of its keys and any dtype."""
    values = torch.randn(3, 4, 8)
    torch.save({layer: values[layer].half() for layer in (2, 0, 1)}, tmp_path / "means.pt")
    found = bs.RegisterMeans.load(tmp_path / "means.pt")
    assert torch.equal(found.values, values.half().float())
    assert found.values.dtype == torch.float32
    assert found.std is found.cls is found.architecture is None


class Malicious:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.zeros(4, 8), 2: torch.zeros(4, 8)},
        {0: torch.zeros(4, 8), 1: torch.zeros(3, 8)},
        [1],
        {},
        {0: torch.zeros(8)},
        {"a": torch.zeros(4, 8)},
        {0: "text"},
    ],
    ids=str,
)
def test_other_content_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "means.pt")
    with pytest.raises(FileError, match=r"means\.pt"):
        bs.RegisterMeans.load(tmp_path / "means.pt")


def test_broken_files_are_refused_and_no_pickle_is_run(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(pickle.dumps(Malicious()))
    for make in (
        lambda: None,
        lambda: torch.save(Malicious(), bad),
        lambda: bad.write_bytes(b"nonsense"),
    ):
        make()
        with pytest.raises(FileError, match=r"bad\.pt"):
            bs.RegisterMeans.load(bad)
    with pytest.raises(FileError, match=r"absent\.pt"):
        bs.RegisterMeans.load(tmp_path / "absent.pt")
    means().save(tmp_path / "means.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "means.safetensors").read_bytes()[:500])
    with pytest.raises(FileError, match=r"half\.safetensors"):
        bs.RegisterMeans.load(tmp_path / "half.safetensors")
    bs.Sites([bs.Site(0, 0, "patch", 1.0)]).save(tmp_path / "sites.safetensors")
    with pytest.raises(FileError, match="register means"):
        bs.RegisterMeans.load(tmp_path / "sites.safetensors")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (means(architecture="vit"), "architecture"),
        (means(registers=3), "values"),
        (means(cls=None), "cls"),
        (means(std=None), "calibrate_registers"),
        (means(count=0), "images"),
    ],
)
def test_only_measurements_of_one_model_add_up(other: bs.RegisterMeans, what: str) -> None:
    with pytest.raises(Incompatible, match=what):
        means() + other


def dinov2_reg(library: str, size: str) -> Any:
    layers, width, heads = SIZES[size]
    if library == "timm":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=518,
            patch_size=14,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            num_classes=0,
            reg_tokens=4,
            no_embed_class=True,
            init_values=1.0,
            dynamic_img_size=True,
        ).eval()
    import transformers as tf

    return tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_register_tokens=4,
            image_size=518,
            patch_size=14,
        )
    ).eval()


def load(size: str) -> bs.RegisterMeans:
    return bs.RegisterMeans.load(MEANS / f"{size}_imagemean_bs10k_trainaug.pt")


@published
@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("size", ["small", "base"])
def test_published_means_on_models_of_the_true_shape(library: str, size: str) -> None:
    """Each block reads them; what it reads of [CLS] and patches is what plain hooks that write the
    same give.
    """
    torch.manual_seed(0)
    model = dinov2_reg(library, size)
    found = load(size)
    pixels = torch.randn(2, 3, 56, 56)
    with (
        bs.patched(model, "fix_registers", means=found),
        bs.record(model, what="block_input") as rec,
    ):
        patched = output_of_features(model, pixels)
    for layer in range(len(found.values)):
        assert torch.equal(rec["block_input"][layer][:, 1:5], found.values[layer].expand(2, -1, -1))
    blocks = model.blocks if library == "timm" else model.encoder.layer
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, layer=layer: (
                torch.cat(
                    [args[0][:, :1], found.values[layer].expand(2, -1, -1), args[0][:, 5:]], 1
                ),
                *args[1:],
            )
        )
    torch.testing.assert_close(patched, output_of_features(model, pixels), rtol=0, atol=0)


@torch.no_grad()
def output_of_features(model: Any, pixels: Tensor) -> Tensor:
    return (
        model.forward_features(pixels)
        if hasattr(model, "forward_features")
        else model(pixels).last_hidden_state
    )


@published
@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("size", ["large", "giant"])
def test_published_means_fit_the_shapes_of_the_large_models(library: str, size: str) -> None:
    with torch.device("meta"):
        host = find_host(dinov2_reg(library, size))
    places = FixRegisters(means=load(size)).places(host, bs.Sites(), None)
    assert [place.layer for place in places] == list(range(SIZES[size][0]))
    with pytest.raises(Incompatible, match="means"):
        FixRegisters(means=load("small")).places(host, bs.Sites(), None)


@published
def test_figure_14() -> None:
    """ViT-G: register 3, channels 179 and 999 (Sun et al. 2024, figure 14).

    A third channel of the same register passes 100 by a little in five early blocks; no other value
    is massive.
    """
    by_place: dict[tuple[int, int], dict[int, float]] = {}
    for each in load("giant").massive():
        by_place.setdefault((each.register, each.channel), {})[each.layer] = each.value
    assert set(by_place) == {(2, 179), (2, 999), (2, 196)}
    assert list(by_place[2, 179]) == list(range(1, 38))
    assert list(by_place[2, 999]) == list(range(1, 34))
    assert list(by_place[2, 196]) == list(range(6, 11))
    assert max(by_place[2, 196].values()) < 121
    assert by_place[2, 179][37] == pytest.approx(-1149.0, abs=0.1)
    assert {each.register for each in load("large").massive()} == {0}
    assert load("small").massive() == load("base").massive() == []
