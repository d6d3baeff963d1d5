"""Whole models of images and text, which make positions of their own (PaliGemma from 1, Qwen2-VL
along the axes of an image), with a mask, behind padding and with a cache. Each situation against
the unpatched model in the same situation, with its start token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import UnsupportedModel
from tests.contract.running import accepts, cache_name, distance
from tests.state import untouched
from tests.whole_models import BUILDERS, kinds_of_tokens, whole_model, with_image

PADDING = 2
STEPS = (2, 1)  # tokens after a prompt with its image

whole = pytest.mark.parametrize("name", BUILDERS)
situated = pytest.mark.parametrize("situation", ["alone", "mask", "padding", "cache"])


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def masked(ids: Tensor, padding: int) -> dict[str, Tensor]:
    behind = torch.cat((ids[:, -1:].repeat(1, padding), ids), 1)
    mask = torch.ones_like(behind)
    mask[:, :padding] = 0
    return {"input_ids": behind, "attention_mask": mask}


def read(model: Any, situation: str, ids: Tensor, image: dict[str, Any]) -> Tensor:
    """The logits of a sequence with its image, in one situation."""
    if situation == "cache":
        return continued(model, ids, image)
    padding = PADDING if situation == "padding" else 0
    given = masked(ids, padding) if situation != "alone" else {"input_ids": ids}
    kinds = kinds_of_tokens(model, given["input_ids"])
    return model(**given, **image, **kinds, use_cache=False).logits[:, padding:]


def continued(model: Any, ids: Tensor, image: dict[str, Any]) -> Tensor:
    """A prompt with its image, then several tokens at once, then a single one."""
    name = cache_name(model)
    end = ids.shape[1] - sum(STEPS)
    prompt = ids[:, :end]
    at = {"cache_position": torch.arange(end)} if accepts(model, "cache_position") else {}
    kinds = kinds_of_tokens(model, prompt)
    output = model(input_ids=prompt, **image, **kinds, **at, use_cache=True)
    parts = [output.logits]
    for size in STEPS:
        end += size
        # With a mask, Qwen2-VL makes positions of the whole sequence for each step.
        mask = (
            {} if "image_grid_thw" in image else {"attention_mask": torch.ones_like(ids[:, :end])}
        )
        if accepts(model, "cache_position"):
            mask["cache_position"] = torch.arange(end - size, end)
        output = model(
            input_ids=ids[:, end - size : end], use_cache=True, **{name: output[name]}, **mask
        )
        parts.append(output.logits)
    return torch.cat(parts, 1)


def key_values(model: Any, ids: Tensor, image: dict[str, Any]) -> bs.KeyValues:
    batch = {"input_ids": ids, **image, **kinds_of_tokens(model, ids)}
    return bs.calibrate_key_values(model, batch, progress=False)


@whole
@situated
@pytest.mark.parametrize("padded_calibration", [False, pytest.param(True, marks=pytest.mark.long)])
def test_transplant(name: str, situation: str, padded_calibration: bool) -> None:
    model = whole_model(name)
    ids, image = with_image(name)
    with_token = read(model, situation, ids, image)[:, 1:]
    behind = read(model, situation, ids[:, 1:], image)
    assert distance(behind, with_token) > 0.1  # cut off, the token is missed
    found = bs.calibrate_key_values(
        model,
        {
            **masked(ids, PADDING if padded_calibration else 0),
            **image,
            **kinds_of_tokens(
                model, masked(ids, PADDING if padded_calibration else 0)["input_ids"]
            ),
        },
        progress=False,
    )
    with bs.patched(model, "transplant", key_values=found):
        assert distance(read(model, situation, ids[:, 1:], image), with_token) < 1e-3
    assert torch.equal(read(model, situation, ids[:, 1:], image), behind)


@whole
@situated
def test_bias(name: str, situation: str) -> None:
    """Without effect it is none; with one, padding and a cache matter as little as without it."""
    model = whole_model(name)
    ids, image = with_image(name)
    plain = {each: read(model, each, ids, image) for each in ("alone", situation)}
    with bs.patched(model, "attention_bias", kind="kv", init="zero_effect"):
        assert distance(read(model, situation, ids, image), plain[situation]) < 1e-3
    torch.manual_seed(1)
    with bs.patched(model, "attention_bias", kind="kv", std=1.0):
        biased = {each: read(model, each, ids, image) for each in ("alone", situation)}
    assert distance(biased["alone"], plain["alone"]) > 0.01
    if distance(plain[situation], plain["alone"]) < 1e-3:
        assert distance(biased[situation], biased["alone"]) < 1e-3


@whole
def test_generate(name: str) -> None:
    """generate() gives positions, and its own steps."""
    model = whole_model(name)
    ids, image = with_image(name)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def generated(tokens: Tensor) -> Tensor:
        kinds = kinds_of_tokens(model, tokens)
        output = model.generate(**masked(tokens, 0), **image, **kinds, **options)
        return torch.stack(output.logits)

    truth = generated(ids)
    with bs.patched(model, "transplant", key_values=key_values(model, ids, image)):
        assert distance(generated(ids[:, 1:]), truth) < 1e-3


@whole
def test_both_biases_at_once(name: str) -> None:
    """Each has its own count of positions; either may go first."""
    model = whole_model(name)
    ids, image = with_image(name)
    found = key_values(model, ids, image)
    with untouched(model, ids):
        for first, second in (("transplant", "attention_bias"), ("attention_bias", "transplant")):
            torch.manual_seed(1)
            for mode in (first, second):
                options = {"key_values": found} if mode == "transplant" else {"kind": "kv"}
                bs.patch_model(model, mode, **options)
            both = read(model, "mask", ids[:, 1:], image)
            assert distance(both, read(model, "alone", ids[:, 1:], image)) < 1e-3
            bs.unpatch_model(model, first)
            bs.unpatch_model(model, second)


@whole
@pytest.mark.parametrize("left", ["transplant", "attention_bias"])
@pytest.mark.parametrize("left_is_first", [True, False])
def test_what_one_bias_counts_does_not_depend_on_another(
    name: str, left: str, left_is_first: bool
) -> None:
    """Patched beside another, which then goes, a model is as with the one patch alone."""
    model = whole_model(name)
    ids, image = with_image(name)
    rest = ids[:, 1:]
    found = key_values(model, ids, image)
    options: dict[str, Any] = {
        "transplant": {"key_values": found},
        "attention_bias": {"kind": "kv", "init": found},
    }
    situations = ("alone", "mask", "padding")
    with bs.patched(model, left, **options[left]):
        alone = {each: read(model, each, rest, image) for each in situations}
    leaving = next(mode for mode in options if mode != left)
    for mode in (left, leaving) if left_is_first else (leaving, left):
        bs.patch_model(model, mode, **options[mode])
    beside = read(model, "alone", rest, image)
    assert distance(beside, alone["alone"]) > 1e-2  # the other has an effect
    bs.unpatch_model(model, leaving)
    for each in situations:
        assert torch.equal(read(model, each, rest, image), alone[each])


def test_what_a_model_remembers_of_its_last_prompt_stays() -> None:
    model = whole_model("qwen2_vl")
    ids, image = with_image("qwen2_vl")
    found = key_values(model, ids, image)
    read(model, "alone", ids, image)
    remembered = model.model.rope_deltas.clone()
    assert remembered.any()
    bs.patch_model(model, "transplant", key_values=found)
    assert torch.equal(model.model.rope_deltas, remembered)


def test_positions_that_count_padding_in_an_unknown_way_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = whole_model("llava")
    ids, image = with_image("llava")
    found = key_values(model, ids, image)
    body = type(model.model.language_model)
    own = body.forward

    def doubled(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        """Positions that run twice as fast once anything is padded."""
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.all():
            position_ids = 2 * (mask.cumsum(1)[:, -kwargs["inputs_embeds"].shape[1] :] - 1)
        return own(self, *args, position_ids=position_ids, **kwargs)

    doubled.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(body, "forward", doubled)
    with untouched(model, ids):
        for mode, options in (("transplant", {"key_values": found}), ("attention_bias", {})):
            with pytest.raises(UnsupportedModel, match="LlavaForConditionalGeneration counts"):
                bs.patch_model(model, mode, **options)


@whole
@situated
def test_pin(name: str, situation: str) -> None:
    """A value is written at the first real token of the text, and nowhere else."""
    model = whole_model(name)
    ids, image = with_image(name)
    block = find_host(model).blocks[0]
    seen: list[Tensor] = []
    site = bs.Site(0, 3, "start", 1234.5)
    bs.patch_model(model, "pin", sites=bs.Sites([site]))
    hook = block.register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    read(model, situation, ids, image)
    hook.remove()
    written = (torch.cat(seen, 1)[..., 3] == 1234.5).nonzero().tolist()
    first = PADDING if situation == "padding" else 0
    assert written == [[row, first] for row in range(len(ids))]
