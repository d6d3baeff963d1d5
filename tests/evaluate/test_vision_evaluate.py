"""Frozen features, k-NN, linear heads and zero-shot against float64 arithmetic written out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.data.reading import ImageBatches, image_files
from biassurgery.evaluate import (
    LinearHead,
    class_and_patch_features,
    compare,
    fit_linear_head,
    image_features,
    imagenet_prompts,
    knn_accuracy,
    linear_accuracy,
    top1_accuracy,
    zero_shot_accuracy,
    zero_shot_head,
)
from tests.models import images, planted_vit
from tests.state import bits, untouched
from tests.tiny_vision import (
    CLASSES,
    DEPTH,
    ROWS,
    WIDTH,
    WITH_CLS,
    blocks_by_hand,
    check,
    double,
    linear_input,
    norm_of,
    pictures,
    split,
    tiny,
    winners,
)

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg"
PHOTOGRAPHS = SHARED / "images" / "imagenet_sample_200"
ABSENT = "the folder `shared` beside the repository, with trained weights and images, is absent"

WORDS = (
    "cat",
    "dog",
    "horse",
    "ship",
    "frog",
    "truck",
    "owl",
    "a",
    "photo",
    "of",
    "the",
    "drawing",
)


# Features


@pytest.mark.parametrize("family", WITH_CLS)
@pytest.mark.parametrize("layers", [1, 4])
@torch.no_grad()
def test_class_and_patch_features(family: str, layers: int) -> None:
    model = tiny(family)
    x = pictures(4)
    with untouched(model):
        found = class_and_patch_features(model, x, layers=layers)
    expected = linear_input(family, model, x, layers)
    assert found.shape == (4, (layers + 1) * WIDTH)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    if family.startswith("timm"):
        own = model.get_intermediate_layers(x, n=layers, return_prefix_tokens=True, norm=True)
        assert torch.equal(
            found, torch.cat([*(prefix[:, 0] for _, prefix in own), own[-1][0].mean(1)], 1)
        )


@pytest.mark.parametrize(
    "family",
    [*WITH_CLS, "timm_mean", "clip", "clip_vision", "clip_projected", "siglip", "open_clip"],
)
@torch.no_grad()
def test_image_features(family: str) -> None:
    model = tiny(family)
    x = pictures(4)
    wide = double(model)
    if family in WITH_CLS:
        expected = linear_input(family, model, x, 1)[:, :WIDTH]
    elif family == "timm_mean":
        expected = wide.fc_norm(blocks_by_hand(family, wide, x.double())[-1][:, 1:].mean(1))
    elif family == "clip_vision":
        expected = wide(x.double()).pooler_output
    elif family == "clip_projected":
        expected = wide(x.double()).image_embeds
    elif family == "open_clip":
        expected = wide.visual(x.double())
    else:
        expected = wide.vision_model(x.double()).pooler_output
        expected = wide.visual_projection(expected) if family == "clip" else expected
    with untouched(model):
        found = image_features(model, x)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@torch.no_grad()
def test_mae_reads_all_patches_in_order() -> None:
    model = tiny("mae")
    x = pictures(4)
    assert model.config.mask_ratio == 0.75
    found = image_features(model, x)
    assert torch.equal(
        found, image_features(model, x)
    )  # although the model itself drops patches at random
    wide = double(model)
    wide.config.mask_ratio = 0.0
    order = torch.arange(16.0).expand(4, -1)
    assert torch.allclose(
        found.double(), wide(x.double(), noise=order).last_hidden_state[:, 0], atol=1e-4
    )


@torch.no_grad()
def test_models_without_such_features() -> None:
    from tests.models import planted

    x = pictures(2)
    with pytest.raises(bs.UnsupportedModel, match="reads text"):
        image_features(planted("llama"), x)
    with pytest.raises(
        bs.UnsupportedModel, match=r"no \[CLS\] token with a final norm.*features=image_features"
    ):
        class_and_patch_features(tiny("open_clip"), x)
    with pytest.raises(bs.BadOption, match="layers: 6, but VisionTransformer has 5 blocks"):
        class_and_patch_features(tiny("timm"), x, layers=6)
    with pytest.raises(bs.UnsupportedModel, match=r"features: \(2, 7, 3\) for 2 images"):
        knn_accuracy(
            tiny("timm"),
            [(x, torch.tensor([0, 1]))],
            [],
            k=1,
            features=lambda _, x: torch.zeros(len(x), 7, 3),
        )


# k-NN


@torch.no_grad()
def by_hand_knn(
    train: Tensor, labels: list[int], test: Tensor, k: int, temperature: float
) -> list[int]:
    """Votes one image and one neighbour at a time, in float64."""
    said = []
    for image in test.double().tolist():
        likeness = []
        for other, label in zip(train.double().tolist(), labels):
            product = sum(a * b for a, b in zip(image, other))
            lengths = math.sqrt(sum(a * a for a in image)) * math.sqrt(sum(b * b for b in other))
            likeness.append((product / lengths, label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(likeness, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        first, second, *_ = sorted([*votes.values(), 0.0], reverse=True)
        assert first - second > 1e-5 * first
        said.append(max(votes, key=lambda label: votes[label]))
    return said


@pytest.mark.parametrize("family", ["timm", "hub_registers", "dinov2", "clip", "open_clip"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5)])
def test_knn_against_a_loop(family: str, k: int, temperature: float) -> None:
    model = tiny(family)
    known = pictures(40, seed=5)
    x = pictures()
    labels = torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        train, test = (image_features(double(model), pixels.double()) for pixels in (known, x))
    said = by_hand_knn(train, labels.tolist(), test, k, temperature)
    batches = split(known, labels, (16, 16, 8))
    with untouched(model):
        check(
            lambda pairs: knn_accuracy(model, batches, pairs, k=k, temperature=temperature),
            x,
            said,
            int(labels.max()) + 1,
        )


def as_points(_: Any, pixels: Tensor) -> Tensor:
    return pixels[:, 0, 0, :2]


def points(*degrees: float) -> Tensor:
    """Images whose first two pixels are a direction, of different lengths."""
    pixels = torch.zeros(len(degrees), 3, 28, 28)
    for row, angle in enumerate(math.radians(degree) for degree in degrees):
        pixels[row, 0, 0, :2] = torch.tensor([math.cos(angle), math.sin(angle)]) * (row + 1)
    return pixels


def test_near_neighbours_outvote_many_at_a_low_temperature_only() -> None:
    train = [(points(5, 40, 41, 42, 180), torch.tensor([2, 1, 1, 1, 0]))]
    model = tiny("timm")

    def said(k: int, temperature: float, label: int) -> float:
        return knn_accuracy(
            model,
            train,
            [(points(0), torch.tensor([label]))],
            k=k,
            temperature=temperature,
            features=as_points,
        )

    assert said(4, 0.07, 2) == 1.0  # exp((cos 5 - cos 41) / 0.07) = 31 votes against 3
    assert said(4, 1.0, 1) == 1.0
    assert said(1, 1.0, 2) == 1.0
    assert said(4, 0.001, 2) == 1.0  # exp(1 / 0.001) is beyond float64
    assert said(5, 1.0, 0) == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, bs.BadOption, "k: 0"),
        ({"k": True}, bs.BadOption, "k: True"),
        ({"k": 3}, bs.BadOption, "train holds 2 images"),
        ({"temperature": 0.0}, bs.BadOption, "temperature: 0.0"),
        ({"temperature": math.nan}, bs.BadOption, "temperature: nan"),
        ({"train": []}, bs.BadBatch, "there are none"),
        ({"test": []}, bs.BadBatch, "there are none"),
        ({"train": [(points(0, 9), torch.tensor([0, -1]))]}, bs.BadBatch, "a label is -1"),
        (
            {"test": [(points(0), torch.tensor([2]))]},
            bs.BadBatch,
            "labels reach from 2 to 2, but train has 2 classes",
        ),
    ],
)
def test_knn_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny("timm")
    call: dict[str, Any] = {
        "train": [(points(0, 90), torch.tensor([0, 1]))],
        "test": [(points(1), torch.tensor([0]))],
        "k": 1,
    }
    with untouched(model), pytest.raises(error, match=message):
        knn_accuracy(model, **(call | options))


# Linear heads


def head_file(folder: Path, read: Tensor) -> Path:
    """A file as published for DINOv2, random but for its bias, which gives every class a chance on
    these features.
    """
    path = folder / "dinov2_vits14_linear_head.pth"
    weight = torch.randn(CLASSES, read.shape[1], generator=torch.Generator().manual_seed(3))
    torch.save({"weight": weight, "bias": -(weight @ read.float().mean(0))}, path)
    return path


@pytest.mark.parametrize("family", WITH_CLS)
@pytest.mark.parametrize("layers", [1, 4])
def test_published_heads(family: str, layers: int, tmp_path: Path) -> None:
    model = tiny(family)
    x = pictures()
    read = linear_input(family, model, x, layers)
    path = head_file(tmp_path, read)
    state = torch.load(path, weights_only=True)
    scores = read @ state["weight"].double().T + state["bias"].double()
    head = LinearHead.load(path)
    assert bits(head.weight) == bits(state["weight"])
    model.train()
    with untouched(model):
        check(lambda pairs: linear_accuracy(model, pairs, head), x, winners(scores))


@pytest.mark.parametrize("reads", [WIDTH, 3 * WIDTH, 4 * WIDTH, 10 * WIDTH, 2 * WIDTH + 1])
def test_a_head_of_another_model_is_refused(reads: int, tmp_path: Path) -> None:
    head = LinearHead.load(head_file(tmp_path, torch.zeros(1, reads)))
    with pytest.raises(
        bs.BadOption,
        match=(
            rf"it reads {reads} numbers, .*width 32 that must be 64 \(layers: 1\) or 160"
            r" \(layers: 4\)"
        ),
    ):
        linear_accuracy(tiny("timm"), [(pictures(1), torch.tensor([0]))], head)


def test_heads_that_cannot_be_read(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    files: dict[str, Any] = {
        "payload": {"weight": Payload()},
        "bias": {"weight": torch.zeros(2, 3)},
        "list": [1],
        "shapes": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_text("no head")
    for name in (*files, "text", "absent"):
        with pytest.raises(bs.FileError, match=f"{name} holds no linear head"):
            LinearHead.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_head_on_other_features() -> None:
    model = tiny("clip")
    x = pictures()
    head = LinearHead(torch.randn(CLASSES, 24), torch.randn(CLASSES))
    with torch.no_grad():
        scores = (
            image_features(double(model), x.double()) @ head.weight.double().T + head.bias.double()
        )
    check(
        lambda pairs: linear_accuracy(model, pairs, head, features=image_features),
        x,
        winners(scores),
    )
    with pytest.raises(bs.BadOption, match="it reads 24 numbers, but the features have 2"):
        linear_accuracy(model, [(x, torch.zeros(ROWS).long())], head, features=as_points)


def test_a_fitted_head_is_at_the_minimum() -> None:
    model = tiny("dinov2")
    x = pictures(40, seed=5)
    penalty = 0.01
    labels = torch.arange(40) % 4
    with untouched(model):
        head = fit_linear_head(model, split(x, labels, (16, 16, 8)), penalty=penalty)
    read = linear_input("dinov2", model, x, 1)
    weight = head.weight.double()
    bias = head.bias.double()
    excess = torch.softmax(read @ weight.T + bias, 1) - nn.functional.one_hot(labels).double()
    assert (excess.T @ read / 40 + penalty * weight).abs().max() < 1e-4
    assert (excess.sum(0) / 40).abs().max() < 1e-4
    assert weight.norm() > 0.1
    assert (
        linear_accuracy(model, [(x, labels)], head)
        == (read @ weight.T + bias).argmax(1).eq(labels).double().mean().item()
    )
    assert (
        linear_accuracy(
            model, [(x, labels)], fit_linear_head(model, [(x, labels)], layers=4, penalty=1e-4)
        )
        == 1.0
    )
    with pytest.warns(UserWarning, match="iterations: 2 were not enough"):
        fit_linear_head(model, [(x, labels)], iterations=2)
    with pytest.raises(bs.BadOption, match="layers: 2; use one of 1, 4"):
        fit_linear_head(model, [(x, labels)], layers=2)
    with pytest.raises(bs.BadOption, match="penalty: 0"):
        fit_linear_head(model, [(x, labels)], penalty=0)


# Zero-shot


def word_tokenizer() -> Any:
    """A tokenizer of transformers that knows a few words and ends texts as CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel(
            {**{word: 5 + at for at, word in enumerate(WORDS)}, "?": 1, "<end>": 49_407}, "?"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 49_407)]
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", unk_token="?")


TEMPLATES = ("a photo of a {}", "the drawing of the {}", lambda name: f"{name} photo")


@torch.no_grad()
def texts_by_hand(family: str, model: Any, name: str) -> Tensor:
    """(24,) float64: each prompt by itself, without a batch and so without padding, except where
    the model was trained on it.
    """
    model = (
        model if family == "clip" else double(model)
    )  # transformers 4 makes no causal mask in float64
    prompts = [f"a photo of a {name}", f"the drawing of the {name}", f"{name} photo"]
    rows = []
    for prompt in prompts:
        if family == "open_clip":
            import open_clip

            row = model.encode_text(open_clip.SimpleTokenizer(context_length=16)([prompt]))[0]
        else:
            ids = [5 + WORDS.index(word) for word in prompt.split()] + [49_407]
            if family == "clip":
                found = model.text_model(torch.tensor([ids]))
                row = model.text_projection(found.pooler_output)[0]
            else:
                row = model.text_model(
                    torch.tensor([ids + [49_407] * (16 - len(ids))])
                ).pooler_output[0]
        rows.append(row / row.square().sum().sqrt())
    mean = sum(rows) / 3
    return (mean / mean.square().sum().sqrt()).double()  # type: ignore[union-attr, return-value, operator]


def tokenizer_of(family: str) -> Any:
    import open_clip

    return (
        open_clip.SimpleTokenizer(context_length=16) if family == "open_clip" else word_tokenizer()
    )


@pytest.mark.parametrize("family", ["clip", "siglip", "open_clip"])
def test_zero_shot(family: str) -> None:
    model = tiny(family)
    x = pictures()
    names = WORDS[:CLASSES]
    expected = torch.stack([texts_by_hand(family, model, name) for name in names], 1)
    model.train()
    with untouched(model):
        head = zero_shot_head(model, tokenizer_of(family), names, TEMPLATES, batch_size=4)
    model.eval()
    assert head.dtype == torch.float32
    assert torch.allclose(head.double(), expected, atol=1e-5)
    with torch.no_grad():
        found = image_features(double(model), x.double())
    found = found / found.norm(dim=1, keepdim=True)
    said = (found @ expected).argmax(1)
    assert zero_shot_accuracy(model, split(x, said), head) == 1.0
    assert zero_shot_accuracy(model, split(x, (said + 1) % CLASSES), head) == 0.0
    common = (
        found.mean(0) / found.mean(0).norm()
    )  # random images look alike: without what they share, no text fits them all
    texts = expected - common[:, None] * (common @ expected)
    with untouched(model):
        check(
            lambda pairs: zero_shot_accuracy(model, pairs, texts.float()), x, winners(found @ texts)
        )


def test_the_default_template_and_open_clips_own() -> None:
    model = tiny("open_clip")
    tokenizer = tokenizer_of("open_clip")
    default = zero_shot_head(model, tokenizer, ["cat", "dog"])
    said = zero_shot_head(model, tokenizer, ["cat", "dog"], ["a photo of a {}."])
    assert torch.equal(default, said)
    names, templates = imagenet_prompts()
    assert (len(names), len(templates)) == (1000, 80)
    assert templates[0]("tench") == "a bad photo of a tench."  # type: ignore[operator]
    assert zero_shot_head(model, tokenizer, names[:3], templates).shape == (24, 3)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("cat", ["a {}"], "class_names: 'cat'"),
        ([], ["a {}"], "class_names"),
        (["cat"], "a {}", "templates: 'a {}'"),
        (["cat"], [], "templates"),
        (["cat"], ["a {}", "a photo"], r"'a photo' has no {}"),
    ],
)
def test_zero_shot_refuses(names: Any, templates: Any, message: str) -> None:
    with pytest.raises(bs.BadOption, match=message):
        zero_shot_head(tiny("clip"), word_tokenizer(), names, templates)


def test_models_without_texts_and_heads_of_others() -> None:
    with pytest.raises(bs.UnsupportedModel, match="embeds no texts"):
        zero_shot_head(tiny("timm"), word_tokenizer(), ["cat"])
    with pytest.raises(
        bs.BadOption, match=r"head: \(D, C\) is \(5, 2\), but the images' embeddings have 24"
    ):
        zero_shot_accuracy(tiny("clip"), [(pictures(1), torch.tensor([0]))], torch.zeros(5, 2))


# What is counted


def test_top1_says_what_to_use_instead() -> None:
    pairs = [(pictures(2), torch.tensor([0, 1]))]
    for family, message in (
        ("clip", "zero_shot_accuracy"),
        ("open_clip", "zero_shot_accuracy"),
        ("hub", "linear_accuracy"),
        ("dinov2", "no logits.*AutoModelForImageClassification"),
    ):
        with pytest.raises(bs.UnsupportedModel, match=message):
            top1_accuracy(tiny(family), pairs)


def test_top1_of_a_classifier_of_transformers() -> None:
    model = tiny("dinov2_classifier")
    x = pictures()
    wide = double(model)
    scores = (
        linear_input("dinov2_classifier", model, x, 1) @ wide.classifier.weight.T
        + wide.classifier.bias
    )
    said = winners(scores.detach())
    check(lambda pairs: top1_accuracy(model, pairs), x, said)
    as_dicts = [{"pixel_values": pixels, "labels": labels} for pixels, labels in split(x, said)]
    assert top1_accuracy(model, as_dicts) == 1.0


def test_top1_of_a_classifier_of_the_hub() -> None:
    class LinearClassifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny("hub_registers")
            self.linear_head = nn.Linear(2 * WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            features = self.backbone.forward_features(x)
            return self.linear_head(
                torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)], 1)
            )

    model = LinearClassifier().eval()
    x = pictures()
    head = LinearHead(model.linear_head.weight.detach(), model.linear_head.bias.detach())
    said = winners(
        linear_input("hub_registers", model.backbone, x, 1) @ head.weight.double().T
        + head.bias.double()
    )
    check(lambda pairs: top1_accuracy(model, pairs), x, said)
    check(lambda pairs: linear_accuracy(model, pairs, head), x, said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_another_dtype(dtype: torch.dtype) -> None:
    model = tiny("timm").to(dtype)
    x = pictures()
    with torch.no_grad():
        said = [int(model(image[None].to(dtype))[0].argmax()) for image in x]
    assert (
        top1_accuracy(
            model, [(image[None], torch.tensor([label])) for image, label in zip(x, said)]
        )
        == 1.0
    )
    assert knn_accuracy(model, [(x, torch.tensor(said))], [(x, torch.tensor(said))], k=1) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model = tiny("dinov2")
    pairs = [(pictures(4), torch.tensor([0, 1, 2, 3]))]
    head = LinearHead(torch.randn(4, 2 * WIDTH), torch.tensor([0.0, math.nan, 0.0, 0.0]))
    with pytest.raises(bs.NonFiniteActivation, match="logits hold NaN"):
        linear_accuracy(model, pairs, head)
    model.layernorm.bias.data[0] = value
    for call in (
        lambda: knn_accuracy(model, pairs, pairs, k=1),
        lambda: fit_linear_head(model, pairs),
    ):
        with pytest.raises(bs.NonFiniteActivation, match="features hold NaN"):
            call()
    clip = tiny("clip")
    clip.text_projection.weight.data[0, 0] = value
    with pytest.raises(bs.NonFiniteActivation, match="embeddings hold NaN"):
        zero_shot_head(clip, word_tokenizer(), ["cat"])


# Patches


def sites_of() -> bs.Sites:
    return bs.calibrate(planted_vit(), [images(8)])


def test_compare_runs_every_measure_under_every_patch() -> None:
    model = planted_vit()
    x = images(24, seed=9)
    sites = sites_of()
    half = images(24, seed=10)
    with torch.no_grad():
        said = model(x).argmax(1)
    rows = model.embed_dim
    head = LinearHead(torch.randn(5, 2 * rows), torch.randn(5))

    def evaluate(host: Any) -> dict[str, float]:
        return {
            "top1": top1_accuracy(host, [(x, said)]),
            "linear": linear_accuracy(host, [(x, said)], head),
            "knn": knn_accuracy(host, [(half, said)], [(x, said)], k=3),
        }

    with untouched(model, x):
        table = compare(model, evaluate, [None, "set_zero", "set_mean"], sites=sites)
    bs.patch_model(model, "set_zero", sites=sites)
    with torch.no_grad():
        zeroed = model(x).argmax(1)
        states = model.forward_features(x)
        linear = (
            torch.cat([states[:, 0], states[:, 1:].mean(1)], 1) @ head.weight.T + head.bias
        ).argmax(1)
        bank = image_features(model, half)
    assert table[None]["top1"] == 1.0
    assert table["set_zero"] == {
        "top1": zeroed.eq(said).double().mean().item(),
        "linear": linear.eq(said).double().mean().item(),
        "knn": (
            (torch.tensor(by_hand_knn(bank, said.tolist(), states[:, 0], 3, 0.07)) == said)
            .double()
            .mean()
            .item()
        ),
    }
    assert table["set_zero"]["top1"] < 1.0
    assert table["set_mean"]["top1"] > table["set_zero"]["top1"]
    assert "100.00 %" in str(table)


@pytest.mark.parametrize("family", ["dinov2", "hub_registers", "clip", "open_clip"])
@torch.no_grad()
def test_features_of_a_patched_model(family: str) -> None:
    model = tiny(family)
    x = pictures(4)
    values = {"channels": (3,), "positions": (0,)}
    before = image_features(model, x)
    with bs.patched(model, bs.SetValue(500.0, **values), layers=[DEPTH - 2]):  # type: ignore[arg-type]
        changed = image_features(model, x)
        if family in WITH_CLS:
            block = find_host(model).blocks[DEPTH - 2]
            seen: list[Tensor] = []
            hook = block.register_forward_hook(
                lambda _, __, output: seen.append(
                    output if isinstance(output, Tensor) else output[0]
                )
            )
            found = class_and_patch_features(model, x, layers=4)
            hook.remove()
            assert torch.equal(seen[0][:, 0, 3], torch.full((4,), 500.0))
            assert torch.equal(
                found[:, 2 * WIDTH : 3 * WIDTH], norm_of(model)(seen[0])[:, 0]
            )  # the last block but one
    assert (changed - before).abs().max() > 0.1
    assert torch.equal(image_features(model, x), before)


def test_fixed_registers_as_in_table_5() -> None:
    model = tiny("dinov2_registers")
    x = pictures()
    means = bs.calibrate_registers(model, [pictures(16, seed=8)])
    read = linear_input("dinov2_registers", model, x, 4)
    weight = torch.randn(CLASSES, 5 * WIDTH)
    head = LinearHead(weight, -(weight @ read.float().mean(0)))
    said = winners(read @ weight.double().T + head.bias.double())
    table = compare(
        model,
        lambda host: {"linear": linear_accuracy(host, split(x, said), head)},
        [None, bs.FixRegisters(means=means), bs.FixRegisters("zero")],
    )
    fixed = dict[str, Tensor]()
    for fill in ("mean", "zero"):
        with bs.patched(model, "fix_registers", fill=fill, means=means):
            fixed[fill] = linear_by_library(model, x)
    agree = {
        fill: (read @ weight.T + head.bias).argmax(1).eq(torch.tensor(said)).double().mean().item()
        for fill, read in fixed.items()
    }
    assert [row.values["linear"] for row in table.rows] == [1.0, agree["mean"], agree["zero"]]
    assert agree["mean"] < 1.0
    assert agree["zero"] < 1.0


@torch.no_grad()
def linear_by_library(model: Any, x: Tensor) -> Tensor:
    """What a head of 4 layers reads, from what transformers itself returns."""
    output = model(x, output_hidden_states=True)
    normed = [*map(model.layernorm, output.hidden_states[-4:-1]), output.last_hidden_state]
    return torch.cat(
        [
            *(state[:, 0] for state in normed),
            normed[-1][:, 1 + model.config.num_register_tokens :].mean(1),
        ],
        1,
    )


@torch.no_grad()
def test_a_test_time_register_is_no_patch() -> None:
    model = tiny("timm_registers")
    x = pictures(8)
    before = class_and_patch_features(model, x, layers=4)
    neurons = bs.find_register_neurons(model, [x], count=4, layer=DEPTH - 2, threshold=0.1)
    with bs.patched(model, "test_time_registers", neurons=neurons):
        found = class_and_patch_features(model, x, layers=4)
        own = model.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
    assert own[-1][0].shape[1] == 16
    assert torch.allclose(
        found, torch.cat([*(prefix[:, 0] for _, prefix in own), own[-1][0].mean(1)], 1), atol=1e-6
    )
    assert (found - before).abs().max() > 1e-3


# A trained model


@pytest.mark.skipif(not (VIT.is_dir() and PHOTOGRAPHS.is_dir()), reason=ABSENT)
def test_knn_of_a_trained_vision_transformer() -> None:
    """Mirrored close-ups find the photograph that they are from: fewer without massive activations,
    as many with their mean.
    """
    from torchvision.transforms.functional import center_crop, hflip, resize

    from biassurgery.data.loading import load_model

    weights = next(VIT.glob("*.safetensors"))
    model = load_model("vit_tiny_patch16_224", weights=weights, device="cpu").model
    files = image_files(PHOTOGRAPHS, 1000)[:40]
    whole = torch.cat([batch[0] for batch in ImageBatches(files, model, 20)])
    labels = torch.arange(40)
    close = resize(hflip(center_crop(whole, [56, 56])), [224, 224], antialias=True)
    sites = bs.calibrate(model, [whole[:12]])
    assert {(site.layer, site.channel) for site in sites} >= {(7, 41)}
    table = compare(
        model,
        lambda host: {
            "knn": knn_accuracy(
                host, split(whole, labels, (20, 20)), split(close, labels, (20, 20)), k=1
            )
        },
        [None, "set_zero", "set_mean"],
        sites=sites,
    )
    assert table[None]["knn"] == pytest.approx(37 / 40, abs=0.026)
    assert table["set_zero"]["knn"] == pytest.approx(33 / 40, abs=0.026)
    assert table["set_mean"]["knn"] == pytest.approx(table[None]["knn"], abs=0.026)
