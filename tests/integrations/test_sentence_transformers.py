"""sentence-transformers on a patched encoder: its pooling reads what the patch made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from tests import encoders
from tests.checkpoints import tokenizer
from tests.models import CHANNEL, LAYER
from tests.state import untouched

TEXTS = ["four score and seven years ago", "our fathers brought forth", "a nation"]


def test_mean_pooling(tmp_path: Path) -> None:
    library = pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers, which no extra installs"
    )
    words: Any = tokenizer(bos=True)
    words.pad_token = "<unk>"
    encoder = encoders.planted("bert")
    encoder = getattr(encoder, "bert", encoder)
    encoder.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    whole = library.SentenceTransformer(str(tmp_path), device="cpu").eval()  # mean pooling
    model = whole[0].auto_model
    plain = whole.encode(TEXTS, convert_to_tensor=True)
    sites = bs.Sites([bs.Site(LAYER, CHANNEL, "start", -20.0, gate=1e-6)])
    with untouched(model):
        bs.patch_model(model, "set_value", value=-20.0, sites=sites)
        found = whole.encode(TEXTS, convert_to_tensor=True, batch_size=3)  # padded together
        assert (found - plain).abs().max() > 0.1
        for text, vector in zip(TEXTS, found):
            ids = words(text, return_tensors="pt").input_ids
            with torch.no_grad():
                hidden = model(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(vector, hidden.mean(0), rtol=1e-4, atol=1e-5)
        bs.unpatch_model(model)
    assert torch.equal(whole.encode(TEXTS, convert_to_tensor=True), plain)
