"""`diagnose` against forward hooks, weights that are really zeroed, and masks written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation
from biassurgery.measure.first_token import evictions, routed
from biassurgery.measure.short_text import losses, sequence_of
from biassurgery.measure.super_weights import without
from tests.models import (
    CHANNEL,
    DELIMITER,
    DELIMITER_ID,
    LAYER,
    LAYERS,
    PATCHES,
    START,
    START_ID,
    images,
    planted,
    planted_vit,
    tokens,
)

WRITER = {
    "llama": "model.layers.1.mlp.down_proj",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "opt": "model.decoder.layers.1.fc2",
    "mpt": "transformer.blocks.1.ffn.down_proj",
}


def read_and_returned(model: nn.Module, **inputs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What every module that ran reads and returns, by hooks: largest magnitude of each token."""
    caught = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                caught[name] = args[0].abs().amax(-1), output.abs().amax(-1)

        return keep

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("family", WRITER)
def test_ranges_are_those_of_hooks_with_and_without_massive_tokens(family):
    model = planted(family)
    batches = [tokens(rows=3, seed=1), tokens(rows=2, length=17, seed=2)]
    found = bs.diagnose(model, batches)
    seen = [
        {name: (read.flatten(), returned.flatten()) for name, (read, returned) in caught.items()}
        for ids in batches
        for caught in [read_and_returned(model, input_ids=ids)]
    ]
    massive = [((ids == START_ID) | (ids == DELIMITER_ID)).flatten() for ids in batches]
    assert len(found.linears) == LAYERS * {"llama": 7, "gpt2": 4, "opt": 6, "mpt": 4}[family]
    for row in found.linears:
        largest = max(s[row.name][0].max().item() for s in seen)
        others = max(s[row.name][0][~m].max().item() for s, m in zip(seen, massive))
        assert row.largest == pytest.approx(largest, rel=1e-6)
        assert row.ordinary == row.kinds["ordinary"] == pytest.approx(others, rel=1e-6)
        returned = max(s[row.name][1].max().item() for s in seen)
        assert row.returned == pytest.approx(returned, rel=1e-6)
        assert row.layer == int(next(p for p in row.name.split(".") if p.isdigit()))
        starts = [(ids == START_ID).flatten() for ids in batches]
        at_starts = max(s[row.name][0][m].max().item() for s, m in zip(seen, starts))
        assert row.kinds["start"] == pytest.approx(at_starts, rel=1e-6)
    assert found.carriers == {"start": 5, "elsewhere": 5}
    writer = next(row for row in found.linears if row.name == WRITER[family])
    assert writer.ratio == pytest.approx(writer.largest / writer.ordinary)
    assert writer.ratio > 2
    assert writer.token.role == "elsewhere"
    assert (writer.token.position, writer.token.id) == (9, DELIMITER_ID)
    assert WRITER[family] in found.ignore(ratio=2.0)


def test_padding_is_not_read():
    model = planted("llama")
    ids = tokens(rows=3)
    padded = F.pad(ids, (4, 0), value=DELIMITER_ID)
    mask = F.pad(torch.ones_like(ids), (4, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    found, plain = bs.diagnose(model, batch), bs.diagnose(model, ids)
    assert found.tokens == plain.tokens == ids.numel()
    for row, other in zip(found.linears, plain.linears):
        assert row.largest == pytest.approx(other.largest, rel=1e-4)
        assert row.ordinary == pytest.approx(other.ordinary, rel=1e-4)
        assert (row.token.role, row.token.position) == (other.token.role, other.token.position)


def test_what_a_later_batch_shows_counts_for_earlier_ones():
    """Start tokens meet this definition nowhere; the gate that delimiters set has them too."""
    model = planted("llama")
    early, late = tokens(rows=4, seed=1, delimiter_at=None), tokens(rows=4, seed=2)
    thresholds = {"min_magnitude": 5000.0, "min_ratio": 0.0}
    found = bs.diagnose(model, [early, late], **thresholds)
    assert found.carriers == {"start": 8, "elsewhere": 4}
    assert found.linears == bs.diagnose(model, [late, early], **thresholds).linears


@pytest.mark.parametrize("family", WRITER)
def test_super_weights_are_the_planted_ones(family):
    model = planted(family)
    found = bs.diagnose(model, [tokens(rows=4, length=48, seed=1)])
    first, second = found.super_weights[:2]
    matrix = model.get_submodule(WRITER[family]).weight
    for weight, level in ((first, DELIMITER), (second, START)):
        assert (weight.name, weight.layer, weight.row) == (WRITER[family], LAYER, CHANNEL)
        place = (weight.column, weight.row) if family == "gpt2" else (weight.row, weight.column)
        assert weight.value == matrix[place].item()
        assert abs(weight.contribution) == pytest.approx(level, rel=0.1)
        assert weight.share == pytest.approx(1.0, abs=0.1)
    assert {first.column, second.column} == {0, 1}
    assert first.loss is not None
    assert first.loss == pytest.approx(rise(model, first, found, family), abs=1e-4)


def rise(model: nn.Module, weight: Any, found: bs.Diagnosis, family: str) -> float:
    """By how much the loss of the short text rises when the weight itself is set to zero."""
    host = host_of(model)
    text = sequence_of(host, {"input_ids": tokens(rows=4, length=48, seed=1)})["input_ids"]
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        place = (weight.column, weight.row) if family == "gpt2" else (weight.row, weight.column)
        zeroed.get_submodule(weight.name).weight[place] = 0
        mean = [
            F.cross_entropy(m(text).logits[0, :-1].double(), text[0, 1:]) for m in (model, zeroed)
        ]
    return (mean[1] - mean[0]).item()


def host_of(model: nn.Module) -> Any:
    from biassurgery.adapters.registry import find_host

    return find_host(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_parameter_is_touched_and_nothing_stays(family):
    model = planted(family)
    state = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    found = bs.diagnose(model, tokens(rows=4, length=48))
    assert found.super_weights[0].loss is not None
    assert [p._version for p in model.parameters()] == versions
    assert [type(module) for module in model.modules()] == kinds
    assert bs.patches(model) == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_weight_that_is_subtracted_is_one_that_is_zero():
    model = planted("llama")
    host, ids = host_of(model), tokens(rows=1, length=48)
    weight = bs.diagnose(model, ids).super_weights[0]
    subtracted = losses(host, {"input_ids": ids}, [without(host, weight)])
    intact = losses(host, {"input_ids": ids})
    with torch.no_grad():
        model.get_submodule(weight.name).weight[weight.row, weight.column] = 0
    zeroed = losses(host, {"input_ids": ids})
    assert (zeroed - intact).abs().max() > 1e-3
    torch.testing.assert_close(subtracted, zeroed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_eviction_is_a_mask_on_the_first_key(family):
    model = planted(family)
    ids, since = tokens(rows=1, length=40), 20
    mask = torch.full((40, 40), -torch.inf).triu(1)
    mask[since:, 0] = -torch.inf
    with torch.no_grad():
        logits = model(ids, attention_mask=mask[None, None], use_cache=False).logits[0, :-1]
        plain = model(ids, use_cache=False).logits[0, :-1]
    want = F.cross_entropy(logits.double(), ids[0, 1:], reduction="none")
    host = host_of(model)
    got = losses(host, {"input_ids": ids}, evictions(routed(host), since))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (logits - plain)[:since].abs().max() < 1e-4 < (logits - plain)[since:].abs().max()
    sinks = bs.diagnose(model, ids).sinks
    assert sinks.evicted == pytest.approx(want[since:].mean().exp().item(), rel=1e-4)
    assert sinks.tokens == 19
    assert sinks.cost == sinks.evicted / sinks.perplexity


def test_the_first_tokens_share_is_that_of_its_column():
    model = planted("llama")
    model.set_attn_implementation("eager")
    ids = tokens(rows=1, length=40)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    found = bs.diagnose(model, ids).sinks
    for layer, probs in enumerate(attentions):
        assert found.layers[layer] == pytest.approx(probs[0, :, 1:, 0].mean().item(), rel=1e-4)
    assert found.share == pytest.approx(sum(found.layers.values()) / LAYERS)


def test_float16_and_where_it_ends():
    model = planted("llama")
    found = bs.diagnose(model, tokens()).float16
    assert found.overflows is None
    assert found.factor == 1.0
    assert found.largest == pytest.approx(DELIMITER, rel=0.1)
    with torch.no_grad():
        model.get_submodule(WRITER["llama"]).weight[CHANNEL] *= 16  # 144,000 at delimiters
    large = bs.diagnose(model, tokens())
    assert large.float16.overflows == LAYER
    assert large.float16.factor == 2.0**-3
    assert large.float16.largest * large.float16.factor * 2 <= 65504
    assert any("rescale" in sentence and "0.125" in sentence for sentence in large.advice)
    inside = large.float16.inside[0]
    assert (inside.name, inside.what) == (WRITER["llama"], "returns")
    assert inside.largest == pytest.approx(large.float16.largest, rel=0.01)
    with pytest.raises(NonFiniteActivation, match="bfloat16"):
        bs.diagnose(model.half(), tokens())


def test_a_model_without_massive_activations_gets_no_advice():
    model = planted("llama")
    with torch.no_grad():
        model.get_submodule(WRITER["llama"]).weight[CHANNEL] = 0
    found = bs.diagnose(model, tokens(rows=2, length=40))
    assert found.verdict[0] == "massive activations: none in 80 tokens"
    assert found.advice == found.super_weights == ()
    assert found.ignore() == []
    assert all(row.ratio == 1.0 for row in found.linears)
    assert found.sinks is not None


def test_one_token_says_nothing():
    with pytest.raises(BadBatch, match="one token each"):
        bs.diagnose(planted("llama"), tokens(rows=4, length=1, delimiter_at=None))


def test_a_short_text_costs_no_loss_but_says_why():
    found = bs.diagnose(planted("llama"), tokens(rows=4, length=12))
    assert found.sinks.perplexity is None
    assert found.sinks.cost is None
    assert "fewer than 16 tokens" in found.verdict[3]
    assert found.super_weights[0].loss is None


def test_a_model_without_a_head_and_one_that_reads_both_ways():
    model = planted("llama").model
    found = bs.diagnose(model, tokens(rows=2, length=40))
    assert found.super_weights[0].name == "layers.1.mlp.down_proj"
    assert found.super_weights[0].loss is None
    assert "no head" in found.sinks.reason


def test_images():
    model = planted_vit()
    found = bs.diagnose(model, images(3))
    row = next(row for row in found.linears if row.name == f"blocks.{LAYER}.mlp.fc2")
    seen = read_and_returned(model, x=images(3))[row.name][0]
    massive = torch.zeros(seen.shape, dtype=torch.bool)
    massive[:, [1 + patch for patch in PATCHES]] = True
    assert row.largest == pytest.approx(seen.max().item(), rel=1e-5)
    assert row.ordinary == pytest.approx(seen[~massive].max().item(), rel=1e-5)
    assert found.carriers["patch"] == 3 * len(PATCHES)
    assert found.super_weights[0].name == row.name
    assert found.super_weights[0].row == CHANNEL
    assert found.sinks.perplexity is None


def test_quantised_linear_layers_are_read_like_others():
    from torchao import quantization

    model, ids = planted("llama"), tokens(rows=4, length=48)
    plain = bs.diagnose(model, ids)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    found = bs.diagnose(model, ids)
    assert [row.name for row in found.linears] == [row.name for row in plain.linears]
    for row, other in zip(found.linears, plain.linears):
        assert row.largest == pytest.approx(other.largest, rel=0.1)
    assert found.ignore(2.0) == plain.ignore(2.0)
    first = found.super_weights[0]
    assert first.place == plain.super_weights[0].place
    assert first.value == pytest.approx(plain.super_weights[0].value, rel=0.02)
    assert first.loss == pytest.approx(plain.super_weights[0].loss, abs=0.1)


def test_experts_read_some_tokens_only():
    found = bs.diagnose(planted("mixtral"), tokens(rows=2, length=40))
    names = [row.name for row in found.linears]
    assert all("experts" not in name for name in names)
    assert sum("self_attn" in name for name in names) == 4 * LAYERS
    assert found.super_weights == ()  # experts write it
    assert any(f"channel {CHANNEL}" in note for note in found.notes)


def test_the_tokenizer_gives_words_and_must_be_one():
    class Words:
        def convert_ids_to_tokens(self, word: int) -> str:
            return f"<{word}>"

    found = bs.diagnose(planted("llama"), tokens(), tokenizer=Words())
    row = max(found.linears, key=lambda row: row.ratio)
    assert str(row.token) == "elsewhere '<1>' at 9"
    with pytest.raises(BadOption, match="convert_ids_to_tokens"):
        bs.diagnose(planted("llama"), tokens(), tokenizer="gpt2")


def test_layers_do_not_depend_on_how_the_data_are_cut():
    model, ids = planted("llama"), tokens(rows=6)
    whole, parts = bs.diagnose(model, ids), bs.diagnose(model, ids.split(2))
    for row, other in zip(whole.linears, parts.linears):
        assert row.largest == pytest.approx(other.largest, rel=1e-5)
        assert math.isclose(row.ordinary, other.ordinary, rel_tol=1e-5)
    assert whole.sites[0].mean == pytest.approx(parts.sites[0].mean, rel=1e-5)


def test_in_inference_mode():
    """Whose tensors have no version counter."""
    plain = bs.diagnose(planted("llama"), tokens())
    with torch.inference_mode():
        found = bs.diagnose(planted("llama"), tokens())
    assert found.linears == plain.linears
    assert found.super_weights == plain.super_weights


def test_a_start_token_is_put_in_front():
    model, ids = planted("llama"), tokens(rows=3)[:, 1:]
    found = bs.diagnose(model, ids, start=START_ID)
    plain = bs.diagnose(model, tokens(rows=3))
    assert found.linears == plain.linears
    assert found.sites == bs.calibrate(model, ids, start=START_ID)
    with pytest.raises(BadOption, match="start"):
        bs.diagnose(model, ids, start="<s>")
