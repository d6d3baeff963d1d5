"""A planted language model as a checkpoint on disk, with a tokenizer of one token a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import VOCAB, planted


def tokenizer(bos: bool, size: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token a character: 0 is BOS, 1 the full stop, the last one what has no token."""
    letters = dict.fromkeys(" etaoinshrdlucmfwypvbgkjqxz,;\n")
    vocabulary = {"<s>": 0, ".": 1, **{c: i + 2 for i, c in enumerate(letters)}, "<unk>": size - 1}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_letter = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.pre_tokenizer = by_letter  # type: ignore[assignment]
    if bos:
        bos_first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        raw.post_processor = bos_first  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],  # as those of decoders have
    )


def checkpoint(folder: Path, bos: bool) -> Any:
    """A planted LLaMA with its tokenizer, saved and loaded as a user would."""
    planted("llama").save_pretrained(folder)
    tokenizer(bos).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
