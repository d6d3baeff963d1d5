"""Attention sinks in `detect` against loops over the attention matrices, in float64."""

from __future__ import annotations

import math

import pytest
import torch

import biassurgery as bs
from biassurgery.surgery.call import Call
from biassurgery.surgery.shares import shares
from tests.models import (
    DELIMITER_ID,
    FAMILIES,
    LAYER,
    LAYERS,
    PAD_ID,
    PATCHES,
    START_ID,
    blocks,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.written_out_attention import dense


def attention_of(model, family, batch):
    """(B, H, T, T) float64 for each layer."""
    if family != "mpt":
        return [call.probs for call in dense(model, **batch)]
    with torch.no_grad():
        return [weights.double() for weights in model(**batch, output_attentions=True).attentions]


@torch.no_grad()
def inputs_of(model, family, batch):
    """(B, T, D) float64, the input of each block; None for the first, where nothing is looked
    for.
    """
    seen = [None]
    handles = [
        block.register_forward_hook(
            lambda m, a, out: seen.append((out if torch.is_tensor(out) else out[0]).double())
        )
        for block in blocks(model, family)
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen[:-1]


def expected(model, family, batches, sequences, causal=True):
    """Per layer the numbers of docs/sinks.md. `sequences[i]`: (row, positions of its tokens) for
    every sequence of batch i.
    """
    rows = [
        {"attention": [], "sink": [], "on_massive": [], "massive_sink": [], "start_on_massive": []}
        for _ in range(LAYERS)
    ]
    for batch, here in zip(batches, sequences):
        attention = attention_of(model, family, batch)
        states = inputs_of(model, family, batch)
        for layer, row in enumerate(rows):
            massive = massive_tokens(states[layer], here)
            for number, positions in here:
                start = positions[0]
                weights = attention[layer][number]
                later = [t for t in positions if t != start]
                row["sink"].append(weights[:, positions, start].mean(1) > 0.3)
                if later:
                    on_start = weights[:, later, start].mean(1)
                    row["attention"].append(on_start)
                    mine = [k for r, k in massive if r == number]
                    row["on_massive"].append(weights[:, later][:, :, mine].sum(2).mean(1))
                    row["start_on_massive"].append(on_start * ((number, start) in massive))
                for key in (k for r, k in massive if r == number and k in positions):
                    queries = [t for t in positions if t >= key or not causal]
                    row["massive_sink"].append(weights[:, queries, key].mean(1) > 0.3)
    return rows


def massive_tokens(state, here):
    """The pairs (row, position) with a massive activation, by the definition, over the real tokens
    of each row.
    """
    found = set()
    for row in {row for row, _ in here} if state is not None else ():
        real = sorted(t for r, positions in here if r == row for t in positions)
        values = state[row, real].abs()
        median = values.flatten().sort().values[(values.numel() - 1) // 2]
        found |= {
            (row, t) for t, value in zip(real, values.amax(1)) if value > max(100, 1000 * median)
        }
    return found


def compare(sinks, rows):
    for layer, row in zip(sinks.layers, rows):
        for name in ("attention", "sink", "on_massive"):
            wanted = torch.stack(row[name]).double().mean(0).tolist()
            assert getattr(layer, name) == pytest.approx(wanted, rel=1e-4, abs=1e-6), (
                layer.layer,
                name,
            )
        assert layer.massive_tokens == len(row["massive_sink"])
        if row["massive_sink"]:
            assert layer.massive_sinks == pytest.approx(
                torch.stack(row["massive_sink"]).double().mean().item(), abs=1e-6
            )
            share = torch.stack(row["start_on_massive"]).sum() / torch.stack(row["attention"]).sum()
            assert layer.start_massive == pytest.approx(share.item(), rel=1e-4)
        else:
            assert math.isnan(layer.massive_sinks)
            assert (layer.start_massive, sum(layer.on_massive)) == (0, 0)
    assert sinks.metric == pytest.approx(
        torch.stack([torch.stack(row["sink"]) for row in rows]).double().mean().item()
    )


def whole(batch):
    """Every row is one sequence."""
    return [(row, list(range(batch.shape[1]))) for row in range(len(batch))]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_batches(family):
    model = planted(family)
    batches = [tokens(rows=3, length=24, seed=1), tokens(rows=2, length=17, seed=2)]
    sinks = bs.detect(model, batches).sinks
    compare(
        sinks,
        expected(
            model,
            family,
            [{"input_ids": ids, "use_cache": False} for ids in batches],
            [whole(ids) for ids in batches],
        ),
    )
    assert (sinks.sequences, sinks.queries, sinks.epsilon) == (5, 3 * 23 + 2 * 16, 0.3)
    assert [layer.massive_tokens for layer in sinks.layers] == [0] * (LAYER + 1) + [10] * (
        LAYERS - LAYER - 1
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "falcon_alibi", "opt"])
def test_padding_is_no_query_and_no_start(family, side):
    model = planted(family)
    lengths = (6, 1, 12)
    length = 12
    real = torch.stack(
        [
            torch.arange(length) >= length - n if side == "left" else torch.arange(length) < n
            for n in lengths
        ]
    )
    ids = tokens(rows=3, length=length, delimiter_at=None).masked_fill(~real, PAD_ID)
    for row, n in enumerate(lengths):
        ids[row, length - n if side == "left" else 0] = START_ID
    batch = {"input_ids": ids, "attention_mask": real.long()}
    sinks = bs.detect(model, [batch]).sinks
    here = [(row, real[row].nonzero()[:, 0].tolist()) for row in range(3)]
    as_generate_counts = (
        {"position_ids": (real.cumsum(1) - 1).clamp(min=0)} if family == "gpt2" else {}
    )
    compare(
        sinks, expected(model, family, [batch | {"use_cache": False} | as_generate_counts], [here])
    )
    assert (sinks.sequences, sinks.queries) == (3, 5 + 0 + 11)


def test_packed_documents_have_a_start_each():
    model = planted("llama")
    ids = tokens(rows=1, length=14, delimiter_at=4)
    ids[0, 6] = START_ID
    batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(6), torch.arange(8)])[None]}
    sinks = bs.detect(model, [batch]).sinks
    compare(
        sinks,
        expected(
            model,
            "llama",
            [batch | {"use_cache": False}],
            [[(0, list(range(6))), (0, list(range(6, 14)))]],
        ),
    )
    assert (sinks.sequences, sinks.queries, sinks.layers[LAYER + 1].massive_tokens) == (2, 5 + 7, 3)


def test_a_batch_without_massive_activations_after_one_with_them():
    model = planted("llama")
    batches = [tokens(rows=2), tokens(rows=2, delimiter_at=None).clamp(min=2)]
    sinks = bs.detect(model, batches).sinks
    compare(
        sinks,
        expected(
            model,
            "llama",
            [{"input_ids": ids, "use_cache": False} for ids in batches],
            [whole(ids) for ids in batches],
        ),
    )
    assert sinks.layers[LAYER + 1].massive_tokens == 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32])
def test_shares_of_keys_under_every_mask(causal, dtype):
    q = torch.randn(2, 4, 5, 8)
    k = torch.randn(2, 2, 7, 8)
    mask = (
        None
        if dtype is None
        else torch.randn(2, 1, 5, 7)
        if dtype == torch.float32
        else torch.rand(2, 1, 5, 7) < 0.8
    )
    logits = (q @ k.repeat_interleave(2, 1).mT).double()
    if mask is not None:
        logits = logits + mask if dtype == torch.float32 else logits.masked_fill(~mask, -torch.inf)
    if causal:
        logits = logits.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(2), -torch.inf)
    at = torch.tensor([[0, 6, 4], [3, 3, 5]])
    found = shares(Call(q, k, k, mask, causal, 1.0), logits.logsumexp(-1).float(), at)
    wanted = logits.softmax(-1).gather(3, at[:, None, None].expand(2, 4, 5, 3))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_leaves_the_start_behind():
    import transformers

    model = planted("mistral")
    windowed = transformers.MistralForCausalLM(
        transformers.MistralConfig(**model.config.to_dict() | {"sliding_window": 4})
    ).eval()
    windowed.load_state_dict(model.state_dict())
    ids = tokens(rows=2, length=16)
    sinks = bs.detect(windowed, [ids]).sinks
    compare(
        sinks, expected(windowed, "mistral", [{"input_ids": ids, "use_cache": False}], [whole(ids)])
    )
    assert max(sinks.layers[2].attention) < 3 / 15  # three of the fifteen others see it


def test_more_massive_tokens_than_fit_at_once():
    model = planted("llama")
    ids = tokens(rows=2, length=90)
    ids[0, 10:80:2] = ids[1, 11:41] = DELIMITER_ID
    sinks = bs.detect(model, [ids]).sinks
    compare(sinks, expected(model, "llama", [{"input_ids": ids, "use_cache": False}], [whole(ids)]))
    assert sinks.layers[LAYER + 1].massive_tokens > 64


@pytest.mark.parametrize("registers", [0, 2])
def test_images_by_role(registers):
    model = planted_vit(reg_tokens=registers)
    batches = [images(3, seed=1), images(2, seed=2)]
    sinks = bs.detect(model, batches).sinks
    prefix = 1 + registers
    count = 1 + registers + 16
    names = ["cls", *(f"register:{i}" for i in range(registers)), "patch"]
    seen = [dense(model, pixels) for pixels in batches]
    for layer, found in enumerate(sinks.layers):
        weights = torch.cat([calls[layer].probs for calls in seen])  # (5, H, T, T)
        assert list(found.roles) == names
        parts = [*weights[..., :prefix].unbind(-1), weights[..., prefix:].sum(-1)]
        for role, part in zip(names, parts):
            assert found.roles[role] == pytest.approx(part.mean((0, 2)).tolist(), rel=1e-4)
        assert found.attention == pytest.approx(
            weights[:, :, 1:, 0].mean((0, 2)).tolist(), rel=1e-4
        )
        assert found.sink == pytest.approx(
            (weights[..., 0].mean(2) > 0.3).double().mean(0).tolist()
        )
        if layer > LAYER:
            massive = [patch + prefix for patch in PATCHES]
            assert found.massive_tokens == 5 * len(massive)
            assert found.on_massive == pytest.approx(
                weights[:, :, 1:][..., massive].sum(-1).mean((0, 2)).tolist(), rel=1e-4
            )
            assert found.massive_sinks == pytest.approx(
                (weights[..., massive].mean(2) > 0.3).double().mean().item()
            )
            assert found.start_massive == 0
    assert (sinks.sequences, sinks.queries) == (5, 5 * (count - 1))
    assert all(name in str(sinks) for name in names)


@pytest.mark.parametrize("family", ["llama", "timm"])
def test_explicit_biases_take_attention_from_all(family):
    model, batch = (
        (planted_vit(), images(2)) if family == "timm" else (planted(family), tokens(rows=2))
    )
    bs.patch_model(model, "attention_bias", kind="kv", init="normal", std=1.0)
    with bs.record(model, ("probs", "bias_mass")) as rec, torch.no_grad():
        model(batch)
    for layer in bs.detect(model, [batch]).sinks.layers:
        probs = rec["probs"][layer.layer]
        assert layer.attention == pytest.approx(probs[:, :, 1:, 0].mean((0, 2)).tolist(), rel=1e-4)
        if family == "timm":
            wanted = 1 - rec["bias_mass"][layer.layer].mean((0, 2))
            assert [sum(values) for values in zip(*layer.roles.values())] == pytest.approx(
                wanted.tolist(), rel=1e-4
            )
    assert rec["bias_mass"][0].max() > 0.1
