"""Zero-shot classification against texts and images by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.evaluate import (
    image_features,
    imagenet_prompts,
    zero_shot_accuracy,
    zero_shot_head,
)
from tests.evaluate.by_hand import WORDS, word_tokenizer
from tests.state import untouched
from tests.tiny_vision import (
    CLASSES,
    check,
    double,
    pictures,
    split,
    tiny,
    winners,
)

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
    mean = torch.stack(rows).sum(0) / 3
    return (mean / mean.square().sum().sqrt()).double()


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
    with pytest.raises(BadOption, match=message):
        zero_shot_head(tiny("clip"), word_tokenizer(), names, templates)


def test_models_without_texts_and_heads_of_others() -> None:
    with pytest.raises(UnsupportedModel, match="embeds no texts"):
        zero_shot_head(tiny("timm"), word_tokenizer(), ["cat"])
    with pytest.raises(
        BadOption, match=r"head: \(D, C\) is \(5, 2\), but the images' embeddings have 24"
    ):
        zero_shot_accuracy(tiny("clip"), [(pictures(1), torch.tensor([0]))], torch.zeros(5, 2))
