"""Models that no adapter knows: images hear of images, and why some cannot be served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel

SMALL: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONVOLUTIONAL = {
    "timm resnet": lambda: of_timm("resnet18"),
    "timm convnext": lambda: of_timm("convnext_atto"),
    "timm mixer": lambda: of_timm("mixer_s32_224"),
    "resnet": lambda: of_transformers("ResNet", embedding_size=8, **SMALL),
    "convnext": lambda: of_transformers("ConvNext", **SMALL),
}
WINDOWED = {
    "timm swin": lambda: of_timm("swin_tiny_patch4_window7_224"),
    "swin": lambda: of_transformers(
        "Swin", embed_dim=12, depths=[1, 1], num_heads=[2, 2], image_size=64
    ),
}
STAGED = {
    "timm pvt": lambda: of_timm("pvt_v2_b0"),
    "timm hiera": lambda: of_timm("hiera_tiny_224"),
    "segformer": lambda: of_transformers("Segformer", num_attention_heads=[1, 1, 1, 1], **SMALL),
}


def of_timm(name: str) -> Any:
    import timm

    return timm.create_model(name)


def of_transformers(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((kind, "has no attention.*cannot be served") for kind in CONVOLUTIONAL),
        *(
            (kind, "widths or resolutions .* attends within windows.*cannot be served")
            for kind in WINDOWED
        ),
        *((kind, "widths or resolutions.*cannot be served") for kind in STAGED),
    ],
)
def test_what_cannot_be_served_hears_why(kind: str, reason: str) -> None:
    model = {**CONVOLUTIONAL, **WINDOWED, **STAGED}[kind]().eval()
    with pytest.raises(UnsupportedModel, match=reason) as raised:
        bs.calibrate(model, torch.randn(1, 3, 64, 64))
    assert "Adapter" not in str(raised.value)
    assert "vision transformer" in str(raised.value)


def test_a_plain_vision_transformer_gets_the_advice_for_images() -> None:
    """Which works as it stands."""
    model = Plain().eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(UnsupportedModel, match=r"MyPlain\(ImageAdapter\)") as raised:
        bs.calibrate(model, images)
    advice = str(raised.value)
    assert "TextAdapter" not in advice
    code = advice.split("try again:\n")[1]
    space: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), space)
    try:
        with bs.record(model, "block_output") as rec:
            model(images)
        assert rec["block_output"][1].shape == (2, 1 + (32 // 16) ** 2, 64)
        assert bs.detect(model, images).roles is not None
    finally:
        forget(space["MyPlain"])


class Plain(nn.Module):
    """A vision transformer of no library."""

    hidden_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, 64))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 96, batch_first=True) for _ in range(2)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patches(pixel_values).flatten(2).mT
        hidden = torch.cat([self.cls.expand(len(patches), -1, -1), patches], 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def forget(adapter: type) -> None:
    from biassurgery.adapters import registry

    registry._ADAPTERS[:] = [known for known in registry._ADAPTERS if type(known) is not adapter]


def test_text_and_sound() -> None:
    class Words(nn.Module):
        pass

    with pytest.raises(UnsupportedModel, match=r"MyWords\(TextAdapter\)"):
        bs.calibrate(Words(), torch.zeros(1, 3, dtype=torch.long))
    sound = of_transformers(
        "Wav2Vec2",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with pytest.raises(UnsupportedModel, match=r"reads input_values; .*token ids or pixels"):
        bs.calibrate(sound, torch.randn(1, 800))


def test_a_clip_whose_image_tower_is_a_resnet() -> None:
    """Its text tower is served, and images are told why they are not."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2}
    model = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).eval()
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(BadBatch, match="image tower, ModifiedResNet, has no attention"):
        bs.calibrate(model, images)
    with pytest.raises(BadOption, match="image tower, ModifiedResNet, has no attention"):
        bs.calibrate(model, images, tower="vision")
    with pytest.raises(UnsupportedModel, match=r"ModifiedResNet has no attention"):
        bs.calibrate(model.visual, images)
    assert isinstance(bs.calibrate(model, torch.randint(1, 60, (2, 16))), bs.Sites)
