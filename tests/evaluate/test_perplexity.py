"""Perplexity against a loop over tokens."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.data.loading import load_model
from biassurgery.data.windows import token_windows
from biassurgery.errors import NoSites
from biassurgery.evaluate import compare, perplexity
from tests.evaluate.loops import Letters, loop, stream
from tests.models import PAD_ID, START_ID, VOCAB, planted, tokens
from tests.state import untouched

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
STORIES = SHARED / "weights" / "stories260K_hf"
ABSENT = "the folder `shared` beside the repository, with trained weights and texts, is absent"


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi"])
def test_batches_against_a_loop(family: str) -> None:
    model = planted(family)
    batches = [tokens(3, 20, seed=4), tokens(2, 11, seed=5)]
    rows = [row for batch in batches for row in batch.tolist()]
    assert perplexity(model, batches) == pytest.approx(loop(model, rows), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "length", "bos", "cuts"),
    [
        (40, 10, None, [(0, 10), (10, 20), (20, 30), (30, 40)]),
        (47, 10, None, [(0, 10), (10, 20), (20, 30), (30, 40)]),
        (47, 10, START_ID, [(0, 9), (9, 18), (18, 27), (27, 36), (36, 45)]),
        (8, 10, None, [(0, 8)]),
        (8, 10, START_ID, [(0, 8)]),
        (9, 10, START_ID, [(0, 9)]),
        (10, 10, START_ID, [(0, 9)]),
        (1, 2, START_ID, [(0, 1)]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stream_is_cut_into_windows(
    count: int, length: int, bos: int | None, cuts: list[tuple[int, int]], batch_size: int
) -> None:
    model = planted("llama")
    ids = stream(count)
    rows = [([] if bos is None else [bos]) + ids[start:stop].tolist() for start, stop in cuts]
    assert token_windows(find_host(model), ids, length, bos).tolist() == rows
    expected = loop(model, rows)
    assert perplexity(model, ids, length=length, bos=bos, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )
    assert perplexity(model, ids[None].int(), length=length, bos=bos) == pytest.approx(
        expected, rel=1e-6
    )


def test_the_default_length_is_the_models_context_but_at_most_2048() -> None:
    model = planted("llama")
    assert token_windows(find_host(model), stream(600), None, None).shape == (2, 256)
    model.config.max_position_embeddings = 8192
    assert token_windows(find_host(model), stream(5000), None, None).shape == (2, 2048)


def test_a_text_gets_no_special_tokens_but_bos() -> None:
    model = planted("llama")
    text = "themassiveactivationsofalanguagemodel"
    ids = [ord(letter) - 95 for letter in text]
    for bos, front in ((None, []), (START_ID, [START_ID])):
        assert perplexity(model, text, tokenizer=Letters(), bos=bos) == pytest.approx(
            loop(model, [front + ids]), rel=1e-6
        )
    assert perplexity(model, text, tokenizer=Letters()) != pytest.approx(
        perplexity(model, text, tokenizer=Letters(), bos=START_ID)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi", "mpt", "opt", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(family: str, side: str) -> None:
    model = planted(family)
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (16, 10, 12)]
    pads = [[PAD_ID] * (16 - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)]
    mask = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads)
    ]
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    expected = loop(model, rows)
    assert perplexity(model, [batch]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, batch) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, batch["input_ids"]) != pytest.approx(
        expected, rel=5e-5
    )  # the mask matters


def test_labels_take_tokens_out() -> None:
    model = planted("llama")
    ids = tokens(2, 12, seed=8)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        expected = math.exp(model(ids, labels=labels).loss.double().item())
    assert perplexity(model, [{"input_ids": ids, "labels": labels}]) == pytest.approx(
        expected, rel=1e-5
    )
    assert perplexity(model, [ids]) != pytest.approx(expected, rel=1e-3)


def test_sums_over_tokens_not_over_batches() -> None:
    model = planted("llama")
    long = tokens(4, 24, seed=1)
    short = tokens(1, 3, seed=2, delimiter_at=None)
    together = perplexity(model, [long, short])
    parts = [math.log(perplexity(model, [part])) for part in (long, short)]
    assert math.log(together) == pytest.approx((parts[0] * 92 + parts[1] * 2) / 94, rel=1e-9)
    assert math.log(together) != pytest.approx(sum(parts) / 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    model = planted("llama", dtype)
    ids = tokens(2, 20, seed=6)
    assert perplexity(model, [ids]) == pytest.approx(
        loop(model, ids.tolist()), rel=1e-3
    )  # row by row differs in the logits' last bit
    row = ids[:1]
    assert perplexity(model, [row]) == pytest.approx(loop(model, row.tolist()), rel=1e-6)


def test_a_training_model_is_evaluated_without_dropout_and_gets_its_modes_back() -> None:
    model = planted("gpt2")
    ids = tokens(2, 12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = loop(model, ids.tolist())
    model.train()
    model.transformer.h[0].eval()
    with untouched(model):
        assert perplexity(model, [ids]) == pytest.approx(expected, rel=1e-6)


def test_no_gradients_and_no_cache() -> None:
    model = planted("llama")
    seen = []

    def note(_: Any, __: Any, arguments: dict[str, Any], output: Any) -> None:
        seen.append((arguments["use_cache"], output.past_key_values, output.logits.requires_grad))

    hook = model.register_forward_hook(note, with_kwargs=True)
    perplexity(model, [tokens(1, 12)])
    hook.remove()
    assert seen == [(False, None, False)]


def test_a_compiled_model_runs_compiled() -> None:
    torch.compiler.reset()  # other tests may have used up how often a forward is compiled
    model = planted("llama")
    ids = tokens(2, 12)
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    assert perplexity(torch.compile(model, backend=backend), [ids]) == pytest.approx(
        loop(model, ids.tolist()), rel=1e-6
    )  # type: ignore[arg-type]
    assert calls


@pytest.mark.skipif(not STORIES.is_dir(), reason=ABSENT)
def test_a_trained_model_that_has_no_massive_activations() -> None:
    loaded = load_model(str(STORIES), device="cpu")
    model = loaded.model
    tokenizer = loaded.tokenizer
    text = (SHARED / "text" / "tinystories_200k.txt").read_text(encoding="utf-8")
    stories = re.split(r"\n\n(?=Once upon a time|One day, )", text)[1:31]
    rows = [tokenizer(story)["input_ids"][:512] for story in stories]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    value = perplexity(model, [torch.tensor([row]) for row in rows])
    assert value == pytest.approx(loop(model, rows[:30]), rel=1e-6)
    assert math.log(value) == pytest.approx(
        1.315, abs=0.05
    )  # nats a token, as published for whole stories behind BOS

    windows = [
        [1, *tokenizer(text[:20_000], add_special_tokens=False)["input_ids"][at : at + 127]]
        for at in range(0, 20 * 127, 127)
    ]
    ids = torch.tensor(
        tokenizer(text[:20_000], add_special_tokens=False)["input_ids"][: 20 * 127 + 50]
    )
    assert perplexity(model, ids, length=128, bos=1) == pytest.approx(
        loop(model, windows), rel=1e-6
    )

    found = bs.detect(model, [torch.tensor([row[:60]]) for row in rows if len(row) >= 60])
    assert len(found.sites) == 0
    assert max(layer.ratio for layer in found.layers) < 30
    with pytest.raises(NoSites, match="empty"):
        compare(model, lambda m: perplexity(m, ids), sites=found.sites)


def test_a_window_may_be_longer_than_a_vocabulary_of_the_size_of_the_context():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    stream = tokens(1, 2 * VOCAB).flatten()
    assert bs.perplexity(LlamaForCausalLM(config).eval(), stream, length=2 * VOCAB) > 1
