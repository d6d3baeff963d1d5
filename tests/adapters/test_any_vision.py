"""The fallback for vision models: what a trial run tells of their tokens, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import every_host, find_host
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from tests.census.vision_tiny import tiny_model
from tests.state import untouched

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
}
IMAGE = (32, 48)  # 4 x 6 patches


def yolos() -> Any:
    config = transformers.YolosConfig(**SIZES, image_size=list(IMAGE), num_detection_tokens=5)
    return loud(transformers.YolosModel(config))


def deit(**options: Any) -> Any:
    return loud(transformers.DeiTModel(transformers.DeiTConfig(**SIZES, image_size=32, **options)))


def loud(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def images(rows: int = 2, size: tuple[int, int] = IMAGE) -> Tensor:
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "roles"),
    [
        (yolos, ("cls", "patch", "detection")),
        (deit, ("cls", "distillation", "patch")),
        (lambda: tiny_model("ijepa"), ("patch",)),
        (lambda: tiny_model("depth_anything"), ("cls", "patch")),
        (lambda: tiny_model("clipseg"), ("cls", "patch")),
        (lambda: tiny_model("siglip2"), ("patch",)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_roles(make, roles):
    assert find_host(make()).roles == roles


def test_looking_a_model_up_leaves_no_trace():
    """Neither on the model nor in the random numbers, also while it trains."""
    model = deit().train()
    state = torch.get_rng_state()
    with untouched(model):
        host = find_host(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert host.width == 32
    assert list(host.blocks) == [b for b in model.modules() if type(b).__name__ == "DeiTLayer"]


def test_one_trial_a_model(monkeypatch):
    from biassurgery.adapters import trial

    model = deit()
    find_host(model)
    monkeypatch.setattr(trial, "_tried", None)
    assert find_host(model).roles[0] == "cls"
    with pytest.raises(UnsupportedModel, match="'NoneType' object is not callable"):
        find_host(copy.deepcopy(model))  # a model of its own


@torch.no_grad()
def test_detection_tokens_are_no_patches():
    """Places, and shares of the attention, against the whole matrix of probabilities."""
    model = yolos()
    batch = images()
    block = find_host(model).blocks[1]

    def plant(_: Any, given: Any) -> Any:
        hidden = given[0].clone()
        hidden[:, 0, 9] = 3000.0
        hidden[:, 1 + 6 + 2, 9] = 3000.0  # row 1, column 2
        hidden[:, 1 + 24 + 3, 9] = 3000.0
        return (hidden, *given[1:])

    with block.register_forward_pre_hook(plant):
        found = bs.detect(model, batch, progress=False)
        with bs.record(model, "probs") as rec:
            model(batch)
    assert found.grid == (4, 6)
    assert found.sinks is not None
    seen = {(p.token, p.patch) for p in found.positions}
    assert seen == {("cls", None), ("patch", (1, 2)), ("detection", None)}
    assert {site.role for site in found.sites} == {"cls", "patch", "detection"}
    for layer in found.sinks.layers:
        probs = rec["probs"][layer.layer].double().mean((0, 2))
        wanted = {"cls": probs[:, :1], "patch": probs[:, 1:25], "detection": probs[:, 25:]}
        assert list(layer.roles) == list(wanted)
        for role, shares in layer.roles.items():
            assert list(shares) == pytest.approx(wanted[role].sum(1).tolist(), abs=1e-5)
    with bs.record(model, "probs") as rec:
        model(batch)
    of_cls = rec["probs"][2][:, :, 0].double().mean((0, 1))
    by_role = bs.attention_by_role(model, batch)
    assert list(by_role) == ["cls", "patch", "detection"]
    shares = [part.sum().item() for part in of_cls.split([1, 24, 5])]
    assert list(by_role.values()) == pytest.approx(shares, abs=1e-6)


# -- what is refused


class Blocks(nn.Module):
    """A vision transformer in the way of transformers, to be spoiled."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(3))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.layer = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.layer(hidden_states)


class SpoiledConfig(transformers.PretrainedConfig):
    model_type = "spoiled"

    def __init__(self, spoil: str = "", **options: Any) -> None:
        self.spoil = spoil
        self.hidden_size = 16
        self.image_size = 32
        self.patch_size = 8
        super().__init__(**options)


class Spoiled(transformers.PreTrainedModel):
    config_class = SpoiledConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stride = 4 if config.spoil == "overlap" else 8
        self.patches = nn.Conv2d(3, 16, 8, stride)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.prompt = nn.Parameter(torch.randn(1, 2, 16))
        self.register_tokens = nn.Parameter(torch.randn(1, 2, 16))
        self.encoder = Blocks(config)
        if config.spoil == "two lists":
            self.decoder = Blocks(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def tokens(self, pixel_values: Tensor) -> Tensor:
        spoil = self.config.spoil
        x = self.patches(pixel_values)
        x = (x.mT if spoil == "columns" else x).flatten(2).mT
        cls, prompt, registers = (
            p.expand(len(x), -1, -1) for p in (self.cls_token, self.prompt, self.register_tokens)
        )
        if spoil == "prompt":
            return torch.cat([cls, prompt, x], 1)
        if spoil == "registers behind":
            return torch.cat([cls, x, registers], 1)
        if spoil == "middle":
            return torch.cat([x[:, :8], cls, x[:, 8:]], 1)
        if spoil == "mixed":
            return x + x.mean(1, keepdim=True)
        if spoil == "windows":
            return x.reshape(-1, 4, 16)
        return torch.cat([cls, registers, x], 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        spoil = self.config.spoil
        x = self.tokens(pixel_values)
        if spoil == "maps":
            x = x[:, 3:].unflatten(1, (4, 4))
        for at, layer in enumerate(self.encoder.layers):
            if spoil == "skipped" and at == 1:
                continue
            x = layer(x)
            if spoil == "looped" and at == 2:
                x = layer(x)
            if spoil == "between" and at == 0:
                x = x * 2
            if spoil == "merged" and at == 1:
                x = x[:, ::2]
            if spoil == "fails":
                raise ValueError("no")
        return x


def spoiled(how: str = "") -> Any:
    torch.manual_seed(0)
    return Spoiled(SpoiledConfig(how)).eval()


def test_unspoiled_it_is_served():
    host = find_host(spoiled())
    assert host.roles == ("cls", "register:0", "register:1", "patch")
    assert (host.width, len(host.blocks)) == (16, 3)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("columns", "do not come row by row"),
        ("prompt", r"tokens \[1, 2\] are the same in every image, and no parameter"),
        ("registers behind", "behind its patches are register:0, register:1"),
        ("middle", "not one run of them"),
        ("mixed", "one pixel reaches 16 tokens"),
        ("overlap", "one pixel reaches .* tokens"),
        ("windows", "read 36 rows for 9 images"),
        ("maps", r"works on \(9, 4, 4, 16\), maps, or windows"),
        ("skipped", "do not run once each"),
        ("looped", "do not run once each"),
        ("between", "something else changes what they hand on"),
        ("merged", "its hidden states are"),
        ("fails", "fails on images, ValueError: no"),
        ("two lists", "several lists of blocks"),
    ],
)
def test_what_cannot_be_told_is_refused(how: str, reason: str) -> None:
    model = spoiled(how)
    with untouched(model), pytest.raises(UnsupportedModel, match=reason):
        bs.calibrate(model, images(size=(32, 32)))


def test_images_of_another_size_must_come_to_whole_patches():
    model = spoiled()
    found = bs.detect(model, images(size=(40, 24)), min_magnitude=1e-3, min_ratio=0, progress=False)
    assert found.grid == (5, 3)
    model.patches.stride = (4, 4)  # another model than that which was tried
    with pytest.raises(UnsupportedModel, match=r"patches of 8 x 8 pixels"):
        bs.detect(model, images(size=(32, 32)), progress=False)


def test_no_token_is_added_to_a_model_that_nobody_has_described():
    model = deit()
    neurons = bs.find_register_neurons(model, images(4, (32, 32)), count=1, layer=1, threshold=1e-3)
    with untouched(model), pytest.raises(UnsupportedModel, match="no adapter describes it"):
        bs.patch_model(model, "test_time_registers", neurons=neurons)


# -- towers


def test_the_tower_of_a_model_that_writes_text_is_meant_by_name_alone():
    model = tiny_model("llava")
    whole = find_host(model)
    assert (whole.adapter.modality, whole.tower) == ("text", None)
    assert find_host(model, "text").tower is None
    tower = find_host(model, "vision")
    assert (tower.adapter.modality, tower.tower) == ("image", "vision")
    assert {host.tower for host in every_host(model)} == {None, "vision"}
    loud(tower.model)
    pixels = images(size=(64, 64))
    sites = bs.calibrate(model, pixels, tower="vision", min_magnitude=1e-3, min_ratio=3)
    assert {site.role for site in sites} <= {"cls", "patch"}
    with torch.no_grad():
        plain = tower.model(pixels).last_hidden_state
        with bs.patched(model, "set_zero", sites=sites, layers="all", tower="vision"):
            assert not torch.equal(tower.model(pixels).last_hidden_state, plain)
            assert [patch.tower for patch in bs.patches(model)] == ["vision"]
        assert torch.equal(tower.model(pixels).last_hidden_state, plain)


def test_a_patch_of_a_tower_is_saved_and_loaded(tmp_path):
    model = tiny_model("llava")
    bs.patch_model(model, "attention_bias", init="normal", std=1.0, tower="vision")
    bs.save_patch(model, tmp_path)
    other = tiny_model("llava")
    bs.load_patch(other, tmp_path)
    assert [patch.tower for patch in bs.patches(other)] == ["vision"]
    pixels = images(size=(64, 64))
    a, b = (find_host(m, "vision").model for m in (model, other))
    with torch.no_grad():
        assert torch.equal(a(pixels).last_hidden_state, b(pixels).last_hidden_state)


@pytest.mark.filterwarnings("ignore")
def test_packed_patches_are_refused_with_the_reason():
    model = tiny_model("qwen2_vl")
    with pytest.raises(BadOption, match=r"strung together \(T, D\)"):
        bs.calibrate(model, images(), tower="vision")
    assert find_host(model).adapter.modality == "text"
    with pytest.raises(UnsupportedModel, match=r"strung together \(T, D\)"):
        bs.calibrate(model.model.visual, images())


def test_siglip2_reads_images_or_patches_of_one_shape():
    model = loud(tiny_model("siglip2"))
    side = 8
    pixels = images(size=(24, 40))
    cut = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, C, 3, 5, 8, 8)
    patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(2, 15, -1)
    padded = torch.cat([patches, torch.full((2, 4, patches.shape[2]), 7.0)], 1)
    mask = torch.tensor([[1] * 15 + [0] * 4] * 2)
    shapes = torch.tensor([[3, 5]] * 2)
    batch = {"pixel_values": padded, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    seen = []
    for given in (pixels, batch):
        found = bs.detect(model, given, min_magnitude=1e-3, min_ratio=2, progress=False)
        assert found.grid == (3, 5)
        assert all(p.position < 15 for p in found.positions)
        seen.append({(s.layer, s.channel): pytest.approx(s.mean) for s in found.sites})
    assert seen[0] == seen[1] != {}
    other = {**batch, "spatial_shapes": torch.tensor([[3, 5], [5, 3]])}
    with pytest.raises(BadBatch, match="images of one shape a batch"):
        bs.detect(model, other, progress=False)
