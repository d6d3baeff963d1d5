"""Which arguments of an attention function reach its softmax: by its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.arguments import arguments_read, for_softmax
from tests import models
from tests.state import output_of

IDS = models.tokens(2, 12)


def reads_some(module: Any, query: Any, *, scaling: Any = None, **kwargs: Any) -> Any:
    return query * scaling * kwargs.get("tilt", 1.0) * kwargs.pop("lift")


def reads_none(module: Any, query: Any, **kwargs: Any) -> Any:
    return query


def hands_on(module: Any, query: Any, **kwargs: Any) -> Any:
    return reads_some(module, query, **kwargs)


def looks_into(module: Any, query: Any, **kwargs: Any) -> Any:
    return query if "tilt" in kwargs else reads_some(module, query, lift=kwargs.get("lift"))


def test_what_a_function_reads() -> None:
    assert arguments_read(reads_some) == ("lift", "module", "query", "scaling", "tilt")
    assert arguments_read(reads_none) == ("module", "query")
    assert arguments_read(hands_on) is None
    assert arguments_read(looks_into) is None
    assert arguments_read(len) is None
    assert arguments_read(lambda module: module) is None


@pytest.mark.parametrize(
    ("function", "refused", "passed"),
    [
        (reads_some, ["lift", "tilt"], ["shift_labels", "anything"]),
        (reads_none, [], ["lift", "tilt", "shift_labels", "anything"]),
        (hands_on, ["lift", "anything"], ["shift_labels", "num_items_in_batch"]),
    ],
)
def test_what_is_refused(function: Any, refused: list[str], passed: list[str]) -> None:
    module = nn.Identity()
    reads = arguments_read(function)
    for name in refused:
        with pytest.raises(UnsupportedModel, match=f"{name}.*does not know"):
            for_softmax(module, {name: 1.0, "scaling": 2.0}, reads, ("scaling",))
        assert for_softmax(module, {name: None}, reads, ("scaling",)) == {}
    for name in passed:
        assert for_softmax(module, {name: 1.0, "scaling": 2.0}, reads, ("scaling",)) == {
            "scaling": 2.0
        }


def test_a_soft_cap_that_a_host_ignores_is_ignored() -> None:
    """eager attention of llama does not read it; that of Gemma 2 does."""
    model = models.planted("llama")
    model.set_attn_implementation("eager")
    plain = output_of(model, IDS)
    with bs.patched(model, "instrument"):
        found = output_of(model, {"input_ids": IDS, "softcap": 0.1})
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gemma_2(implementation: str) -> None:
    """sdpa of transformers 4 leaves the cap out, in silence; sdpa of transformers 5 refuses it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=models.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=0.05,
        initializer_range=0.2,
        attn_implementation=implementation,
    )
    if implementation == "sdpa" and not transformers.Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this version of transformers does not let Gemma 2 run sdpa")
    model = transformers.Gemma2ForCausalLM(config).eval()
    plain = output_of(model, IDS)
    with bs.patched(model, "instrument"):
        torch.testing.assert_close(output_of(model, IDS), plain, rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    model = models.planted("llama")
    torch.compiler.reset()
    with bs.patched(model, "instrument"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            found = compiled(IDS, labels=IDS, shift_labels=IDS.flip(1), use_cache=False)
            wanted = model(IDS, labels=IDS, shift_labels=IDS.flip(1), use_cache=False)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
