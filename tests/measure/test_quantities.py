"""Quantities of `record` that somebody else writes."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption
from biassurgery.measure import seen as seen_attention
from biassurgery.measure.quantities import QUANTITIES, AttentionQuantity, BlockQuantity
from tests.measure.recorded import ATTENTION, near
from tests.models import LAYERS, blocks, images, planted, planted_vit, tokens
from tests.state import untouched
from tests.third_party.alterations.measures import Entropy
from tests.written_out_attention import dense


class StreamNorm(BlockQuantity):
    name = "stream_norm"

    def of(self, hidden):
        return hidden.norm(dim=-1)


class Written(AttentionQuantity):
    """How much the attention writes, of what it reads."""

    name = "written"
    at = "module"

    def of(self, seen):
        assert seen.call.q.dim() == 4
        return seen.output.norm(dim=-1) / seen.attention_input.norm(dim=-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_entropy_against_dense_attention(family):
    image = family == "timm"
    model = planted_vit() if image else planted(family)
    batch = images(2) if image else tokens(rows=2, length=12)
    with untouched(model, batch), bs.record(model, "attention_entropy") as rec, torch.no_grad():
        model(batch)
    assert list(rec["attention_entropy"]) == list(range(LAYERS))
    for layer, call in enumerate(dense(model, batch)):
        wanted = torch.special.entr(call.probs).sum(-1)
        near(rec["attention_entropy"][layer], wanted)
        assert wanted.max() > 1


def test_with_explicit_biases_it_is_that_of_what_remains():
    model = planted("llama")
    bs.patch_model(model, "attention_bias", kind="kv", init="normal", std=1.0)
    with bs.record(model, ("attention_entropy", "probs", "bias_mass")) as rec, torch.no_grad():
        model(tokens(rows=2))
    for layer in range(LAYERS):
        probs = rec["probs"][layer].double()
        assert rec["bias_mass"][layer].max() > 0.01
        near(rec["attention_entropy"][layer], torch.special.entr(probs).sum(-1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_and_modules_against_hooks(family):
    model = planted(family)
    ids = tokens(rows=2, length=12)
    norms, written = [], []

    def see_block(module, args, output):
        hidden = output if torch.is_tensor(output) else output[0]
        norms.append(hidden.double().square().sum(-1).sqrt())

    def see_attention(module, args, kwargs, output):
        read = args[0] if args else kwargs["hidden_states"]
        written.append(output[0].double().norm(dim=-1) / read.double().norm(dim=-1))

    handles = [block.register_forward_hook(see_block) for block in blocks(model, family)]
    handles += [
        getattr(block, ATTENTION.get(family, "self_attn")).register_forward_hook(
            see_attention, with_kwargs=True
        )
        for block in blocks(model, family)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    with bs.record(model, ("stream_norm", "written"), layers=[1, 3]) as rec, torch.no_grad():
        model(ids)
    assert list(rec["stream_norm"]) == list(rec["written"]) == [1, 3]
    for layer in (1, 3):
        near(rec["stream_norm"][layer], norms[layer])
        near(rec["written"][layer], written[layer])


def test_what_several_quantities_read_is_computed_once(monkeypatch):
    """The square logits, behind four quantities, once a layer; none behind `sink_mass`."""
    calls = []
    real = seen_attention.attention_logits

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(seen_attention, "attention_logits", counted)
    model = planted("llama")
    what = ("logits", "probs", "attention_entropy", "sink_mass")
    with bs.record(model, what) as rec, torch.no_grad():
        model(tokens(rows=2))
    assert len(calls) == LAYERS
    near(rec["probs"][2], rec["logits"][2].softmax(-1))
    calls.clear()
    with bs.record(model, ("sink_mass", "q", "norm_output")), torch.no_grad():
        model(tokens(rows=2))
    assert calls == []


def test_names():
    model = planted("llama")
    known = ("block_input", "block_output", "norm_output", "sink_mass", "attention_entropy")
    with (
        untouched(model, tokens()),
        pytest.raises(BadOption) as caught,
        bs.record(model, ("q", "entropy")),
    ):
        pass
    assert "'entropy'" in str(caught.value)
    assert all(name in str(caught.value) for name in known)
    with pytest.raises(BadOption, match=r"'q'.* is taken by .*Queries"):
        type("Q", (AttentionQuantity,), {"name": "q", "of": lambda self, seen: seen.out})
    assert QUANTITIES.find("q").__name__ == "Queries"
    assert QUANTITIES.find("attention_entropy") is Entropy


def test_an_error_in_a_quantity_leaves_the_model_as_it_was():
    class Broken(AttentionQuantity):
        name = "broken"

        def of(self, seen):
            raise KeyboardInterrupt

    model = planted("llama")
    try:
        with untouched(model, tokens()):
            with pytest.raises(KeyboardInterrupt), bs.record(model, "broken"):
                model(tokens())
            with bs.record(model, "q") as rec, torch.no_grad():  # and nothing is remembered
                model(tokens())
            assert list(rec["q"]) == list(range(LAYERS))
    finally:
        del QUANTITIES._classes["broken"]


def test_a_model_whose_own_forward_is_compiled():
    """`model.forward = torch.compile(...)` hides the class of the model, not that of its body."""
    model = planted("llama")
    ids = tokens(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with bs.record(model, ("sink_mass", "block_output")) as wanted, torch.no_grad():
        model(ids, attention_mask=mask)
    model.forward = torch.compile(model.forward, backend="eager")
    with bs.record(model, ("sink_mass", "block_output")) as rec, torch.no_grad():
        model(ids, attention_mask=mask)
    assert len(rec.steps) == 1
    for name in rec:
        for layer in range(LAYERS):
            assert rec[name][layer].equal(wanted[name][layer])
