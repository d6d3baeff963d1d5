"""A constant token in front of every sequence, against batches that are written by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from tests.checkpoints import tokenizer
from tests.models import PAD_ID, VOCAB, images, planted, planted_vit, tokens

S = 50  # the start token
P = PAD_ID


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def test_without_padding() -> None:
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    for given in (ids, {"input_ids": ids}, (ids,)):
        batch = bs.with_start(planted("llama"), given, S)
        assert lists(batch) == {"input_ids": [[S, 4, 5, 6], [S, 7, 8, 9]]}
    assert ids.tolist() == [[4, 5, 6], [7, 8, 9]]


def test_directly_in_front_of_the_first_real_token() -> None:
    """Left padding, right padding, none, a hole, and a row that is all padding."""
    ids = torch.tensor([[P, P, 4, 5], [4, 5, P, P], [4, 5, 6, 7], [P, 4, 5, 6], [P, P, P, P]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    batch = bs.with_start(
        planted("llama"), {"input_ids": ids, "attention_mask": mask, "use_cache": False}, S
    )
    assert batch["use_cache"] is False
    assert batch["attention_mask"].tolist() == [
        [0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0],
    ]
    assert batch["input_ids"][:4].tolist() == [
        [P, P, S, 4, 5],
        [S, 4, 5, P, P],
        [S, 4, 5, 6, 7],
        [P, S, 4, 5, 6],
    ]


def test_positions_and_labels() -> None:
    batch = {
        "input_ids": torch.tensor([[P, 4, 5, 6], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "position_ids": torch.tensor([[1, 0, 1, 2], [5, 6, 7, 8]]),
        "labels": torch.tensor([[-100, 4, 5, -100], [4, 5, 6, 7]]),
    }
    batch = bs.with_start(planted("llama"), batch, S)
    assert batch["position_ids"].tolist() == [[1, 0, 1, 2, 3], [5, 6, 7, 8, 9]]
    # Neither the start token nor the first word, which nothing predicts without it.
    assert batch["labels"].tolist() == [[-100, -100, -100, 5, -100], [-100, -100, 5, 6, 7]]
    one_row = {"input_ids": tokens(3, 4, delimiter_at=None), "position_ids": torch.arange(4)[None]}
    longer = bs.with_start(planted("llama"), one_row, S)
    assert longer["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_the_hosts_own_name_of_its_token_ids() -> None:
    from tests.models import FAMILIES

    for family in FAMILIES[:3]:
        model = planted(family)
        assert model(**bs.with_start(model, tokens(), S)).logits.shape[1] == 25


def test_a_token_of_the_tokenizer_or_its_id() -> None:
    model = planted("llama")
    words = tokenizer(bos=False)
    by_name = bs.with_start(model, tokens(), ";", tokenizer=words)
    by_id = bs.with_start(model, tokens(), words.convert_tokens_to_ids(";"))
    assert by_name["input_ids"].equal(by_id["input_ids"])
    assert by_name["input_ids"][0, 0] == words.convert_tokens_to_ids(";") != VOCAB - 1


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (VOCAB, f"is token {VOCAB}, and the model has {VOCAB}"),
        (-1, "give a token such as"),
        (True, "give a token such as"),
        (1.0, "give a token such as"),
        ("<nothing>", "'<nothing>' is no token of this tokenizer; give one of .*<s>"),
    ],
)
def test_what_is_no_token(start: Any, said: str) -> None:
    with pytest.raises(BadOption, match=f"start: .*{said}"):
        bs.with_start(planted("llama"), tokens(), start, tokenizer=tokenizer(bos=False))


def test_a_token_needs_its_tokenizer() -> None:
    with pytest.raises(BadOption, match="tokenizer= is needed"):
        bs.calibrate(planted("llama"), tokens(), start="<s>")


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}, "several documents"),
        ({"token_type_ids": torch.zeros(2, 6, dtype=torch.int64)}, "holds token_type_ids"),
        ({"attention_mask": torch.ones(2, 9)}, r"holds attention_mask of shape \(2, 9\)"),
        ({"position_ids": torch.zeros(3, 2, 6)}, "holds position_ids"),
        ({"past_key_values": object()}, "holds past_key_values a object"),
    ],
)
def test_where_another_token_would_not_fit(further: dict[str, Any], said: str) -> None:
    model = planted("llama")
    batch = {"input_ids": tokens(2, 6, delimiter_at=None), **further}
    for verb in (bs.calibrate, bs.detect, bs.calibrate_key_values, bs.perplexity):
        with pytest.raises(BadBatch, match=f"start: .*{said}"):
            verb(model, [batch], start=S)


def test_embeddings_and_images_are_refused() -> None:
    model = planted("llama")
    embeddings = model.get_input_embeddings()(tokens()).detach()
    with pytest.raises(BadBatch, match=r"start: .*inputs_embeds.*get_input_embeddings\(\)\(id\)"):
        bs.calibrate(model, {"inputs_embeds": embeddings}, start=S)
    with pytest.raises(UnsupportedModel, match=r"start: 50, but .* reads images"):
        bs.detect(planted_vit(), images(), start=S)


def test_two_start_tokens_are_told() -> None:
    """BOS of the config is there already; or the token itself is."""
    model = planted("llama")
    with pytest.warns(UserWarning, match=r"start: .*begin with token 0 already.*50 and 0") as told:
        bs.calibrate(model, [tokens(), tokens(seed=2)], start=S)
    assert [warning.filename for warning in told] == [__file__]  # once
    with pytest.warns(UserWarning, match="begin with token 50 already"):
        bs.with_start(model, torch.full((2, 4), S), S)
    others = tokens()
    others[0, 0] = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.with_start(model, others, S)  # by chance
