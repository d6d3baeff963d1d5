"""From a text to token ids: the BOS policy, windows, selection."""

from __future__ import annotations

from pathlib import Path

import pytest

from biassurgery.data.reading import (
    bos_token,
    read_text,
    selected,
    text_windows,
)
from biassurgery.errors import BadBatch, BadOption, FileError
from tests.checkpoints import tokenizer
from tests.models import planted


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_the_bos_policy() -> None:
    plain = tokenizer(bos=False)
    prefixed = tokenizer(bos=True)
    assert [bos_token(plain, "auto"), bos_token(plain, "yes"), bos_token(plain, "no")] == [
        None,
        0,
        None,
    ]
    assert [bos_token(prefixed, "auto"), bos_token(prefixed, "yes"), bos_token(prefixed, "no")] == [
        0,
        0,
        None,
    ]
    plain.bos_token = None
    with pytest.raises(BadOption, match="no BOS token"):
        bos_token(plain, "yes")


def test_a_tokenizer_of_two_special_tokens_must_be_told() -> None:
    from tokenizers import processors

    double = tokenizer(bos=True)
    special = [("<s>", 0), ("<unk>", 95)]
    double.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=special
    )
    with pytest.raises(BadOption, match="2 tokens in front"):
        bos_token(double, "auto")
    assert bos_token(double, "yes") == 0


def test_texts_follow_each_other_without_special_tokens_between() -> None:
    one = "the first text."
    two = "and another one"
    words = tokenizer(bos=True)
    ids = [
        token for text in (one, two) for token in words(text, add_special_tokens=False)["input_ids"]
    ]
    assert len(ids) == 30
    assert text_windows(planted("llama"), words, [one, two], 11, 0).tolist() == [
        [0, *ids[at : at + 10]] for at in (0, 10, 20)
    ]
    assert text_windows(planted("llama"), words, [one, two], 11, None).tolist() == [
        ids[at : at + 11] for at in (0, 11)
    ]


def test_reading_a_text(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes("naïve\n".encode())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert read_text(tmp_path / "good.txt") == "naïve\n"
    for name in ("bad.txt", "absent.txt", "."):
        with pytest.raises(FileError, match="cannot be read"):
            read_text(tmp_path / name)


def test_selection() -> None:
    assert selected(5, "all", None) == [0, 1, 2, 3, 4]
    assert selected(5, "even", None) == [0, 2, 4]
    assert selected(5, "odd", None) == [1, 3]
    assert selected(5, "odd", 1) == [1]
    assert selected(5, "even", 9) == [0, 2, 4]
    for total, split in ((0, "all"), (1, "odd")):
        with pytest.raises(BadBatch, match="leaves none"):
            selected(total, split, None)
