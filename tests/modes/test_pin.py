"""`pin` beyond the battery: every cache, generation, compilation, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadOption, NoSites, UnsupportedModel
from tests import encoders, models, vision
from tests.models import CHANNEL, LAYER, PAD_ID, START_ID
from tests.modes.rewritten import outputs
from tests.state import output_of, untouched

VALUE = 1234.5
SITES = bs.Sites([bs.Site(LAYER, CHANNEL, "start", VALUE)])


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Token ids without a delimiter."""
    return models.tokens(rows, length, seed, delimiter_at=None)


@pytest.fixture
def pinned() -> Any:
    return bs.patch_model(models.planted("llama"), "pin", sites=SITES)


def written(model: Any, *forwards: dict[str, Any]) -> Tensor:
    """(B, T) bool: where the value stands behind the block, of forwards in a row."""
    with outputs(model, "llama") as seen, torch.no_grad():
        for arguments in forwards:
            model(**arguments)
    return torch.cat(seen[LAYER], 1)[..., CHANNEL] == VALUE


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=32)


def dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@pytest.mark.parametrize("cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 3, 3]], ids=str)
def test_only_the_first_token_of_a_stream(pinned, cache, masked, chunks) -> None:
    ids = tokens(2, 10)
    past = cache(pinned)
    mask = torch.ones(2, 10, dtype=torch.long)
    ends = torch.tensor(chunks).cumsum(0).tolist()
    forwards = [
        {"input_ids": part, "past_key_values": past, "use_cache": True}
        | ({"attention_mask": mask[:, :end]} if masked else {})
        for part, end in zip(ids.split(chunks, 1), ends)
    ]
    found = written(pinned, *forwards)
    assert found[:, 0].all()
    assert not found[:, 1:].any()


def test_behind_a_prefix_cache_nothing_is_first(pinned) -> None:
    """A prefix that was read once, and continued by several texts."""
    ids = tokens(1, 10)
    prefix = dynamic_cache(pinned)
    assert written(pinned, {"input_ids": ids[:, :6], "past_key_values": prefix})[0, 0]
    for mask in (None, torch.ones(1, 10, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)):
        again = {"input_ids": ids[:, 6:], "past_key_values": copy.deepcopy(prefix)}
        if mask is not None and mask.shape[1] == 10:
            again["attention_mask"] = mask
        assert not written(pinned, again).any()


def test_in_a_sink_cache_nothing_is_first_again(pinned) -> None:
    """Also once the start token has been evicted, or moved with the window."""
    cache = bs.SinkCache(pinned, window=6, sinks=1)
    ids = tokens(1, 14)
    steps = [{"input_ids": ids[:, :4]}] + [{"input_ids": ids[:, t : t + 1]} for t in range(4, 14)]
    found = written(pinned, *({"past_key_values": cache, "use_cache": True, **s} for s in steps))
    assert found[0].tolist() == [True] + [False] * 13


def test_left_padding_with_and_without_positions(pinned) -> None:
    ids = tokens(2, 10)
    ids[0, :3] = PAD_ID
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = torch.zeros(2, 10, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 0] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}):
        assert written(pinned, {"input_ids": ids, "attention_mask": mask, **given}).equal(wanted)
    embeds = pinned.get_input_embeddings()(ids)
    assert written(pinned, {"inputs_embeds": embeds, "attention_mask": mask}).equal(wanted)


@pytest.mark.parametrize("positioned", [False, True])
def test_a_mask_as_wide_as_a_static_cache(pinned, positioned) -> None:
    ids = tokens(2, 10)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = static_cache(pinned)
    parts = [
        {
            "input_ids": ids[:, begin:end],
            "attention_mask": mask,
            "past_key_values": cache,
            **({"position_ids": positions[:, begin:end]} if positioned else {}),
        }
        for begin, end in ((0, 5), (5, 6), (6, 10))
    ]
    wanted = torch.zeros(2, 10, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 0] = True
    assert written(pinned, *parts).equal(wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_writes_once(pinned, options) -> None:
    """Left-padded, several rows, beams, static caches: as if each row were read anew."""
    ids = tokens(2, 8)
    ids[0, :3] = PAD_ID
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = pinned.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, **options
    )
    for row, start in ((0, 3), (1, 0)):
        alone = pinned.generate(
            ids[row : row + 1, start:],
            attention_mask=torch.ones(1, 8 - start, dtype=torch.long),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            **options,
        )
        assert found[row, start:].tolist() == alone[0].tolist()


def test_packed_documents_behind_a_cache(pinned) -> None:
    """A chunk of a packed row in which a document begins."""
    cache = dynamic_cache(pinned)
    ids = tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    parts = [
        {
            "input_ids": ids[:, a:b],
            "position_ids": positions[:, a:b],
            "past_key_values": cache,
            "use_cache": True,
        }
        for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    assert written(pinned, *parts)[0].nonzero().flatten().tolist() == [0, 6]


def test_a_producer_that_is_pruned() -> None:
    """What makes the value is gone; with the mean written in its place the model says the same."""
    model = models.planted("llama")
    sites = bs.calibrate(model, tokens(4, 12))
    ids = tokens(2, 12, seed=3)
    wanted = output_of(model, ids)
    model.model.layers[LAYER].mlp.down_proj.weight.data[CHANNEL] = 0.0
    broken = output_of(model, ids)
    bs.patch_model(model, "pin", sites=sites)
    found = output_of(model, ids)
    assert (broken - wanted).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_it_writes_where_values_are_born_and_where_they_grow() -> None:
    model = models.planted("llama")
    growing = bs.Sites(
        [
            bs.Site(layer, CHANNEL, "start", mean, gate=500.0, first=first)
            for layer, mean, first in ((1, 2000.0, True), (2, 2100.0, False), (3, 9000.0, True))
        ]
    )
    bs.patch_model(model, "pin", sites=growing)
    assert bs.patches(model)[0].layers == (1, 3)
    with outputs(model, "llama") as seen:
        output_of(model, tokens(2, 6))
    assert (seen[1][0][:, 0, CHANNEL] == 2000.0).all()
    assert (seen[3][0][:, 0, CHANNEL] == 9000.0).all()


def test_without_calling_the_model_as_a_whole_it_is_refused(pinned) -> None:
    pinned(tokens(2, 6))
    block = pinned.model.layers[LAYER]
    hidden = torch.zeros(1, 4, 64)
    rotary = pinned.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(UnsupportedModel, match="as a whole"):
        block(hidden, position_embeddings=rotary)


def test_another_start_token_is_said() -> None:
    """104,000 on an ordinary word: sites that know their start token warn, once."""
    model = models.planted("llama")
    sites = bs.calibrate(model, tokens(4))
    assert sites.origin.start_token == START_ID
    bs.patch_model(model, "pin", sites=sites)
    ids = tokens(2, 6)
    output_of(model, ids)
    ids[1, 0] = 40
    with pytest.warns(UserWarning, match="begins with token 40"):
        output_of(model, ids)
    output_of(model, ids)  # once is enough: warnings are errors here


def test_sites_without_a_place_are_left_out_or_refused() -> None:
    model = models.planted("llama")
    elsewhere = bs.Site(LAYER, CHANNEL, "elsewhere", 9000.0)
    with pytest.warns(UserWarning, match="elsewhere"):
        bs.patch_model(model, "pin", sites=bs.Sites([*SITES, elsewhere]))
    assert [site.role for site in bs.patches(model)[0].sites] == ["start"]
    bs.unpatch_model(model)
    with untouched(model, tokens()):
        with pytest.raises(NoSites, match="fixed place"):
            bs.patch_model(model, "pin", sites=bs.Sites([elsewhere]))
        levels = [bs.Site(LAYER, CHANNEL, "start", 10.0**n, cluster=n) for n in (3, 4)]
        with pytest.raises(BadOption, match="several levels"):
            bs.patch_model(model, "pin", sites=bs.Sites(levels))
        with pytest.raises(BadOption, match="roles start, elsewhere"):
            bs.patch_model(model, "pin", sites=bs.Sites([bs.Site(1, 7, "cls", 3.0)]))


def test_a_start_token_that_has_left_the_input_cannot_be_pinned() -> None:
    model = models.planted("llama")
    key_values = bs.calibrate_key_values(model, tokens(4, 12))
    bs.patch_model(model, "transplant", key_values=key_values)
    with untouched(model, tokens()[:, 1:]), pytest.raises(BadOption, match="'transplant'"):
        bs.patch_model(model, "pin", sites=SITES)
    bs.unpatch_model(model)
    bs.patch_model(model, "pin", sites=SITES)
    with untouched(model, tokens()), pytest.raises(BadOption, match="'pin'"):
        bs.patch_model(model, "transplant", key_values=key_values)


def test_two_patches_tell_sequences_apart_by_themselves() -> None:
    model = models.planted("llama")
    bs.patch_model(model, "pin", sites=SITES)
    other = bs.Sites([bs.Site(LAYER + 1, 3, "start", 77.0)])
    bs.patch_model(model, bs.modes.Pin(), sites=other)
    with outputs(model, "llama") as seen:
        output_of(model, tokens(2, 6))
    assert (seen[LAYER][0][:, 0, CHANNEL] == VALUE).all()
    assert (seen[LAYER + 1][0][:, 0, 3] == 77.0).all()


@pytest.mark.parametrize("family", ["dinov2_with_registers", "timm_vit"])
def test_registers_and_cls_of_images(family: str) -> None:
    model = vision.planted(family)
    roles = {"cls": 500.0, "register:1": 900.0}
    sites = bs.Sites([bs.Site(LAYER, CHANNEL, role, mean) for role, mean in roles.items()])
    bs.patch_model(model, "pin", sites=sites)
    seen: list[Tensor] = []
    vision.blocks(model, family)[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    output_of(model, models.images(2))
    assert (seen[0][:, 0, CHANNEL] == 500.0).all()
    assert (seen[0][:, 2, CHANNEL] == 900.0).all()
    assert not torch.isin(
        seen[0][:, [1, *range(3, 8)], CHANNEL], torch.tensor([500.0, 900.0])
    ).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_forwards_that_begin_elsewhere(reentrant: bool) -> None:
    """A block that is run anew must write where its own forward did, or say that it cannot."""
    sites = bs.Sites([bs.Site(LAYER, CHANNEL, "start", 0.5)])  # small: its gradients are large
    plain, model = (
        bs.patch_model(models.planted("llama").train(), "pin", sites=sites) for _ in range(2)
    )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(2, 10)
    padded = torch.ones_like(ids)
    padded[:, :3] = 0
    masks = (padded, torch.ones_like(ids))

    def loss(of: Any, mask: Tensor) -> Tensor:
        return of(ids, attention_mask=mask, use_cache=False).logits[:, 3:].pow(2).mean()

    for mask in masks:  # one after the other
        loss(model, mask).backward()
        loss(plain, mask).backward()
    for found, wanted in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    both = loss(model, masks[0]) + loss(model, masks[1])
    with pytest.raises(UnsupportedModel, match="checkpointing"):
        both.backward()
    loss(model, masks[0]).backward()  # and the next step is as any other


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders_of_text(family: str) -> None:
    """The first real token of each row, with padding on either side."""
    model = encoders.planted(family)
    bs.patch_model(model, "pin", sites=SITES)
    seen: list[Tensor] = []
    encoders.blocks(model, family)[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 8:] = 0
    output_of(model, {"input_ids": tokens(2, 10), "attention_mask": mask})
    written = (seen[0][..., CHANNEL] == VALUE).nonzero().tolist()
    assert [spot for spot in written if mask[tuple(spot)]] == [[0, 3], [1, 0]]
