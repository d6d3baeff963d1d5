"""Register means: files, sums, the definition applied to them, refusals; and the means that Sun et
al. 2024 published.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from tests import vision
from tests.models import HIDDEN, LAYERS, images
from tests.state import output_of, untouched

MEANS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "dinov2_reg_means"
ABSENT = "the folder `shared` beside the repository, with the published register means, is absent"
published = pytest.mark.skipif(not MEANS.is_dir(), reason=ABSENT)
SIZES = {
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "giant": (40, 1536, 24),
}


def means(
    seed: int = 0, registers: int = 4, layers: int = LAYERS, width: int = HIDDEN, **fields: Any
) -> bs.RegisterMeans:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layers, registers, width, generator=generator)
    std = torch.rand(layers, registers, width, generator=generator)
    return bs.RegisterMeans(
        **{
            "values": values,
            "std": std,
            "cls": values[:, 0] + 1,
            "count": 3,
            "architecture": "hub_dinov2",
            **fields,
        }
    )


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
    with pytest.raises(bs.FileError, match=r"means\.pt"):
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
        with pytest.raises(bs.FileError, match=r"bad\.pt"):
            bs.RegisterMeans.load(bad)
    with pytest.raises(bs.FileError, match=r"absent\.pt"):
        bs.RegisterMeans.load(tmp_path / "absent.pt")
    means().save(tmp_path / "means.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "means.safetensors").read_bytes()[:500])
    with pytest.raises(bs.FileError, match=r"half\.safetensors"):
        bs.RegisterMeans.load(tmp_path / "half.safetensors")
    bs.Sites([bs.Site(0, 0, "patch", 1.0)]).save(tmp_path / "sites.safetensors")
    with pytest.raises(bs.FileError, match="register means"):
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
    with pytest.raises(bs.IncompatibleSites, match=what):
        means() + other


def test_the_definition_on_means() -> None:
    values = torch.ones(2, 3, 5)
    values[1, 2, 4] = -2000.0
    values[1, 0, 1] = 1500.0
    values[0, 1, 1] = 900.0
    assert bs.RegisterMeans(values).massive() == [
        bs.MassiveRegister(1, 2, 4, -2000.0, 2000.0),
        bs.MassiveRegister(1, 0, 1, 1500.0, 1500.0),
    ]
    assert len(bs.RegisterMeans(values).massive(min_ratio=800)) == 3
    assert bs.RegisterMeans(0.01 * values).massive() == []


HUB: Any = vision.planted("hub_dinov2")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, bs.CalibrationRequired, r"calibrate_registers\(model, images\)"),
        ({"fill": "average"}, bs.BadOption, "fill: 'average'.*'mean'"),
        ({"fill": "noise"}, bs.CalibrationRequired, "means"),
        ({"fill": "noise", "means": means(std=None)}, bs.BadOption, "standard deviation"),
        ({"means": torch.zeros(5, 4, 64)}, bs.BadOption, "means: Tensor"),
        ({"means": means(registers=3)}, bs.IncompatibleSites, r"\(5, 3, 64\).*\(5, 4, 64\)"),
        ({"means": means(layers=4)}, bs.IncompatibleSites, r"\(4, 4, 64\)"),
        ({"fill": "zero", "registers": 4}, bs.BadOption, r"registers: \[4\].*4 registers"),
        ({"fill": "zero", "registers": [-1]}, bs.BadOption, "registers"),
        ({"fill": "zero", "registers": "all"}, bs.BadOption, "registers"),
        ({"fill": "zero", "cls": 1}, bs.BadOption, "cls: 1"),
        ({"means": means(cls=None), "cls": True}, bs.BadOption, "cls: True"),
        ({"fill": "zero", "layers": "first"}, bs.BadOption, "layers: 'first'"),
        ({"fill": "zero", "layers": 5}, bs.LayerOutOfRange, "5"),
        ({"fill": "zero", "sites": bs.Sites([bs.Site(0, 0, "patch", 1.0)])}, bs.BadOption, "sites"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with untouched(HUB), pytest.raises(error, match=match):
        bs.patch_model(HUB, "fix_registers", **options)


def test_a_level_that_float16_cannot_hold() -> None:
    values = torch.zeros(LAYERS, 4, HIDDEN)
    values[3, 1, 2] = 7e4
    with pytest.raises(bs.LevelOverflow, match="layer 3"):
        bs.patch_model(
            vision.planted("hub_dinov2").half(), "fix_registers", means=bs.RegisterMeans(values)
        )


@pytest.mark.parametrize("family", ["dinov2", "siglip_vision", "vit"])
def test_models_without_registers_say_so(family: str) -> None:
    model = vision.planted(family)
    for do in (
        lambda: bs.calibrate_registers(model, images()),
        lambda: bs.patch_model(model, "fix_registers", fill="zero"),
    ):
        with untouched(model), pytest.raises(bs.UnsupportedModel, match="register"):
            do()


def test_resume_adds() -> None:
    batch = images(6, seed=3)
    whole = bs.calibrate_registers(HUB, batch)
    half = bs.calibrate_registers(HUB, batch[:2])
    found = bs.calibrate_registers(HUB, batch[2:], resume=half)
    torch.testing.assert_close(found.values, whole.values)
    assert (found.count, found.architecture) == (6, "hub_dinov2")
    with pytest.raises(bs.BadOption, match="resume"):
        bs.calibrate_registers(HUB, batch, resume=whole.values)  # type: ignore[arg-type]
    with pytest.raises(bs.NonFiniteActivation):
        bs.calibrate_registers(HUB, batch.index_fill(0, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize("chunks", [0, 5])
def test_chunked_blocks_of_the_hub(chunks: int) -> None:
    """DINOv2 keeps its blocks in chunks where it was trained with FSDP; the same numbers come
    out.
    """
    from tests.hub_dinov2 import DinoVisionTransformer

    model = DinoVisionTransformer(
        28, 7, HIDDEN, LAYERS, 4, num_register_tokens=4, block_chunks=chunks
    ).eval()
    model.load_state_dict(dict(zip(model.state_dict(), HUB.state_dict().values())))
    assert torch.equal(output_of(model, images()), output_of(HUB, images()))
    with (
        bs.patched(model, "fix_registers", fill="zero"),
        bs.patched(HUB, "fix_registers", fill="zero"),
    ):
        assert torch.equal(output_of(model, images()), output_of(HUB, images()))


@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "fix_registers", "fill": "zero"},
        {"mode": "set_value", "value": 1.0, "channels": 1, "positions": 1, "layers": 2},
        {"mode": "attention_bias"},
    ],
    ids=lambda mode: mode["mode"],
)
def test_nested_tensors_are_refused(mode: dict[str, Any]) -> None:
    """Crops of several sizes in one forward of DINOv2: each would be edited by the numbers of the
    first, so none is.
    """
    model = vision.planted("hub_dinov2")
    crops = [images(2), images(1)]
    assert len(model(crops, is_training=True)) == 2
    bs.patch_model(model, **mode)
    if (
        mode["mode"] == "attention_bias"
    ):  # each crop goes through the attention by itself, as it should
        assert all(
            not torch.equal(a["x_prenorm"], b["x_prenorm"])
            for a, b in zip(model(crops), vision.planted("hub_dinov2")(crops))
        )
        return
    with pytest.raises(bs.UnsupportedModel, match="one tensor of images at a time"):
        model(crops, is_training=True)


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
    places = bs.FixRegisters(means=load(size)).places(host, bs.Sites(), None)
    assert [place.layer for place in places] == list(range(SIZES[size][0]))
    with pytest.raises(bs.IncompatibleSites, match="means"):
        bs.FixRegisters(means=load("small")).places(host, bs.Sites(), None)


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
