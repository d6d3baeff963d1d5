"""What sinks send, against dense attention in float64 from what a model hands to sdpa."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation
from biassurgery.measure.sink_kinds import effective_ranks
from tests import models
from tests.state import untouched
from tests.written_out_attention import dense

kinds_of = bs.evaluate.sink_kinds


def rank_of(vectors):
    """The exponential of the entropy of the singular values of (n, d)."""
    values = torch.linalg.svdvals(vectors)
    parts = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in parts.tolist() if p > 0))


def written_out(call, sinks, queries):
    """The numbers of one layer by head; sinks are positions, queries a list of them a row."""
    found = []
    rows = range(len(call.q))
    for head in range(call.q.shape[1]):
        sent, rest, share, ranks, output_ranks, directions = [], [], [], [], [], []
        for row in rows:
            probs, v = call.probs[row, head], call.v[row, head]
            mine = torch.stack([sum(probs[t, s] * v[s] for s in sinks) for t in queries[row]])
            whole = torch.stack([probs[t] @ v for t in queries[row]])
            sent += [norm.item() for norm in mine.norm(dim=1)]
            rest += [norm.item() for norm in (whole - mine).norm(dim=1)]
            share += [sum(probs[t, s] for s in sinks).item() for t in queries[row]]
            ranks.append(rank_of(mine))
            output_ranks.append(rank_of(whole))
            directions.append(mine.sum(0) / mine.sum(0).norm())
        norms = call.v[:, head].norm(dim=-1)
        others = [t for t in range(norms.shape[1]) if t not in sinks]
        pairs = [(a @ b).item() for i, a in enumerate(directions) for b in directions[:i]]
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        found.append(
            {
                "share": mean(share),
                "value": (norms[:, list(sinks)].mean() / norms[:, others].mean()).item(),
                "update": sum(sent) / sum(rest),
                "rank": mean(ranks),
                "output_rank": mean(output_ranks),
                "alike": mean(pairs),
            }
        )
    return found


def check(found, calls, sinks, queries):
    heads = iter(found.heads)
    for layer, call in enumerate(calls):
        for head, wanted in enumerate(written_out(call, sinks, queries)):
            one = next(heads)
            assert (one.layer, one.head) == (layer, head)
            for name, value in wanted.items():
                assert getattr(one, name) == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_a_decoder_and_its_start_token():
    model = models.planted("llama")
    ids = models.tokens(rows=3, length=12)
    with untouched(model, ids):
        found = kinds_of(model, [ids[:2], ids[2:]], min_share=0.05)
    check(found, dense(model, ids), (0,), [list(range(1, 12))] * 3)
    assert (found.sequences, found.queries) == (3, 33)
    assert [one.rank for one in found.heads] == pytest.approx([1] * len(found.heads), rel=1e-4)
    assert sum(found.counts.values()) == len(found.heads) == models.LAYERS * models.HEADS


def test_several_sinks_of_images():
    model = models.planted_vit()
    pictures = models.images(2)
    found = kinds_of(model, [pictures], sink_tokens=(1, 4, 13))
    queries = [[t for t in range(17) if t not in (1, 4, 13)]] * 2
    check(found, dense(model, pictures), (1, 4, 13), queries)
    assert any(one.rank > 1.2 for one in found.heads)


def test_left_padding_is_left_out():
    model = models.planted("llama")
    ids = models.tokens(rows=2, length=12)
    padded = torch.nn.functional.pad(ids, (4, 0), value=models.PAD_ID)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    found = kinds_of(model, [{"input_ids": padded, "attention_mask": mask}])
    plain = kinds_of(model, [ids])
    for one, other in zip(found.heads, plain.heads):
        for name in ("share", "value", "update", "rank", "output_rank", "alike"):
            wanted = getattr(other, name)
            assert getattr(one, name) == pytest.approx(wanted, rel=1e-3, abs=1e-4), name


def sinking(value):
    """A decoder whose first layer looks at its start token alone, with that much of its value."""
    model = models.planted("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 30] = 3.0  # all queries are alike
        model.model.embed_tokens.weight[models.START_ID, 30] = 0.0
        key = models.KEYS[models.START_ID]
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.zero_()
        width = models.HIDDEN // models.HEADS
        # The last pair of rotary channels turns least: its logits hardly depend on positions.
        attention.q_proj.weight[width - 1 :: width, 30] = 5.0
        attention.k_proj.weight[width - 1 :: width, key] = 5.0
        attention.v_proj.weight[:, key] *= value
    return model


def test_nop_and_broadcast_are_told_apart():
    ids = models.tokens(rows=3, length=20, delimiter_at=None)
    for value, kind in ((0.0, "nop"), (3.0, "broadcast")):
        found = kinds_of(sinking(value), [ids])
        first = found.heads[: models.HEADS]
        assert {one.kind for one in first} == {kind}, first
        assert all(one.share > 0.9 for one in first)
        assert found.by_layer()[0][kind] == models.HEADS
    assert found.heads[0].alike == pytest.approx(1)  # a constant token sends a constant
    assert kind in str(found)
    assert found.to_pandas().loc[(0, 0), "kind"] == kind


def test_effective_ranks():
    basis = torch.eye(5, dtype=torch.float64)
    one = torch.outer(torch.arange(1.0, 8.0, dtype=torch.float64), basis[2])
    found = effective_ranks(torch.stack([one[:7], basis[torch.arange(7) % 5] * 0, one])[None])
    assert found[0].tolist() == pytest.approx([1, 0, 1])
    even = effective_ranks(basis[None, None])
    assert even.item() == pytest.approx(5)


def test_what_cannot_be_told():
    model = models.planted("llama")
    for options, match in (
        ({"min_share": 0}, "min_share: 0"),
        ({"max_rank": "one"}, "max_rank: 'one'"),
        ({"sink_tokens": -1}, "sink_tokens: .* negative"),
        ({"sink_tokens": 99}, r"sink_tokens: \(99,\) in rows of 24"),
    ):
        with pytest.raises(BadOption, match=match):
            kinds_of(model, [models.tokens()], **options)
    with pytest.raises(BadBatch, match="two tokens or more"):
        kinds_of(model, [models.tokens(length=1, delimiter_at=None)])


def test_what_is_not_finite_has_no_sinks():
    model = models.planted("llama")
    ids = models.tokens()
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteActivation, match="attention of block 3 returns NaN"):
        kinds_of(broken, ids)
    with untouched(model, ids):
        assert kinds_of(model, ids).sequences == len(ids)
