"""Models of images and text: one tower, the other, or both; each with plain hooks or float64
arithmetic beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible
from tests.adapters.towers import END, LENGTH, SIZE, WIDTH, build, every_model, images, seen, texts
from tests.contract.running import default_dtype_of
from tests.models import LAYER
from tests.state import untouched


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
    found = {each: bs.calibrate(model, batches[each], tower=each) for each in ("vision", "text")}
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
    with pytest.raises(Incompatible):
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
            BadOption, match=f"tower: .*'{'text' if tower == 'both' else tower}'.*has 'vision'"
        ),
    ):
        bs.patch_model(model, "instrument", tower=tower)
    with pytest.raises(BadOption, match="one at a time"):
        bs.calibrate(build("clip"), images(), tower="both")  # type: ignore[arg-type]
    assert bs.patch_model(model, "instrument", tower="vision") is model


def test_padding_behind_the_end_of_a_text_is_not_measured() -> None:
    """open_clip's texts end in zeros behind the highest id."""
    model = build("open_clip")
    ids = texts(2)
    ids[:, 4] = END
    ids[:, 5:] = 0
    found = bs.detect(model, ids, tower="text")
    assert found.tokens == 2 * 5


def test_sites_of_towers_need_a_tower() -> None:
    site: Tensor | Any = bs.Sites([bs.Site(LAYER, 4, "patch", mean=50.0)])
    with pytest.raises(BadOption, match="tower='both'"):
        bs.patch_model(build("clip"), "set_mean", sites={"vision": site, "text": site})
    assert len(texts()) == 2
