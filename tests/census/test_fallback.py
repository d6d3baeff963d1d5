"""The structural fallback where structure is not plain: towers, several stacks, odd outputs;
nothing is ever guessed silently.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import biassurgery as bs
from biassurgery.adapters import fallback as adapter
from biassurgery.adapters.registry import find_host
from biassurgery.errors import BadBatch, UnsupportedModel
from biassurgery.surgery.block import hidden_of, with_hidden
from tests.census.examine import batch_of, forward
from tests.census.tiny import tiny_model

Pair = namedtuple("Pair", "hidden other")
HIDDEN = torch.randn(2, 3, 4)
NEW = torch.randn(2, 3, 4)
SITES = bs.Sites([bs.Site(1, 5, "elsewhere", mean=3.0, gate=1e-6)])


def test_what_a_block_returns_keeps_its_type():
    other = torch.ones(1)
    for output in (
        HIDDEN,
        (HIDDEN,),
        (HIDDEN, None),
        [HIDDEN, other],
        Pair(HIDDEN, other),
        {"hidden": HIDDEN, "other": other},
        BaseModelOutput(last_hidden_state=HIDDEN, hidden_states=(other,)),
    ):
        assert hidden_of(output) is HIDDEN
        changed = with_hidden(output, NEW)
        assert type(changed) is type(output)
        assert hidden_of(changed) is NEW
        if not isinstance(output, torch.Tensor):
            assert len(changed) == len(output)
    assert with_hidden(Pair(HIDDEN, other), NEW).other is other
    assert (
        with_hidden(
            BaseModelOutput(last_hidden_state=HIDDEN, hidden_states=(other,)), NEW
        ).hidden_states[0]
        is other
    )


@pytest.mark.parametrize(
    ("layout", "shape"), [("TBD", (3, 2, 4)), ("BTSD", (2, 3, 5, 4)), ("SBTD", (5, 2, 3, 4))]
)
def test_every_layout_is_read_by_index(layout, shape):
    output = torch.randn(shape)
    hidden = hidden_of(output, layout)
    new = hidden.clone()
    new[1, 2, -1] = 7.0  # second sequence, third token, last channel of the last stream
    expected = output.clone()
    expected[{"TBD": (2, 1, 3), "BTSD": (1, 2, 4, 3), "SBTD": (4, 1, 2, 3)}[layout]] = 7.0
    assert hidden.shape[:2] == (2, 3)
    assert hidden.numel() == output.numel()
    assert torch.equal(with_hidden((output, None), new, layout)[0], expected)


@pytest.mark.parametrize("output", [None, (), {}, "text", (None, HIDDEN), HIDDEN[0], HIDDEN[None]])
def test_another_output_is_refused(output):
    with pytest.raises(UnsupportedModel, match="hidden state"):
        hidden_of(output)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("gemma3", "model.language_model.layers"),
        ("git", "git.encoder.layer"),
        ("got_ocr2", "model.language_model.layers"),
        ("phi4_multimodal", "model.layers"),
        ("whisper", "model.decoder.layers"),
        ("moshi", "model.layers"),
    ],
)
def test_towers_are_passed_over(model_type, path):
    model = tiny_model(model_type)
    host = find_host(model)
    assert list(host.blocks) == list(model.get_submodule(path))
    elsewhere = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == len(host.blocks) and m[0] not in host.blocks
    ]
    assert elsewhere or model_type in (
        "whisper",
        "moshi",
    )  # the others do have a tower as deep as the decoder


@pytest.mark.parametrize(
    ("model_type", "width", "layout"),
    [
        ("gemma3n_text", 4 * 32, "SBTD"),
        ("xlnet", 32, "TBD"),
        ("opt", 32, "BTD"),
        ("electra", 32, "BTD"),
        ("rembert", 32, "BTD"),
    ],
)
def test_width_and_layout(model_type, width, layout):
    host = find_host(tiny_model(model_type))
    assert (host.width, host.layout) == (width, layout)


def encoder_decoder(encoder: int, decoder: int) -> nn.Module:
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=2,
        vocab_size=64,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("depths", [(2, 2), (2, 3), (3, 2)])
def test_an_encoder_with_a_decoder_is_refused(depths):
    with pytest.raises(UnsupportedModel, match="encoder and a decoder"):
        find_host(encoder_decoder(*depths))


def test_a_model_that_reads_no_text_is_none_of_its():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    assert not adapter.AnyDecoder().matches(transformers.Wav2Vec2Model(config))
    assert not adapter.AnyDecoder().matches(transformers.ViTModel(transformers.ViTConfig()))


def test_two_lists_on_the_path_of_text_are_refused_by_name():
    model = tiny_model("granite")
    model.model.more = nn.ModuleList(nn.Identity() for _ in model.model.layers)
    with pytest.raises(UnsupportedModel, match=r"model\.layers, model\.more"):
        find_host(model)


def test_a_list_of_another_length_is_no_block_list():
    model = tiny_model("granite")
    model.config.num_hidden_layers += 1
    with pytest.raises(UnsupportedModel, match="register_adapter"):
        find_host(model)


def test_several_text_configs_are_refused():
    model = tiny_model("granite")
    model.config.decoder = SimpleNamespace()
    model.config.generator = SimpleNamespace()
    with pytest.raises(UnsupportedModel, match="several text configs"):
        find_host(model)


@pytest.mark.parametrize("model_type", ["blt", "cpmant", "prophetnet", "xlm"])
def test_types_that_are_refused_by_name_would_be_refused_without_it(model_type, monkeypatch):
    model = tiny_model(model_type)
    batch = batch_of(model_type)
    with pytest.raises(UnsupportedModel, match="no residual stream"):
        find_host(model)
    monkeypatch.setattr(adapter, "UNREADABLE", {})
    with pytest.raises((UnsupportedModel, BadBatch)):
        bs.calibrate(model, batch)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "granite"])
def test_a_wrong_layout_or_width_is_refused_when_the_model_runs(model_type, monkeypatch):
    model = tiny_model(model_type)
    batch = batch_of(model_type)
    plain = forward(model, batch).logits
    if model_type == "granite":
        monkeypatch.setattr(adapter.AnyDecoder, "width", lambda self, model: 31)
    else:
        monkeypatch.setattr(adapter, "STREAMS", {})
    with pytest.raises(UnsupportedModel):
        bs.calibrate(model, batch)
    with bs.patched(model, "set_mean", sites=SITES), pytest.raises(UnsupportedModel):
        forward(model, batch)
    assert torch.equal(forward(model, batch).logits, plain)


class Looped(nn.Module):
    """Runs its blocks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.table = nn.Embedding(64, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids)
        for layer in (*self.layers, *self.layers):
            hidden = layer(hidden)
        return hidden


class LoopedAdapter(bs.extend.TextAdapter):
    family = "looped"

    def matches(self, model):
        return isinstance(model, Looped)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)

    def width(self, model):
        return 8

    def run(self, model, batch):
        model(**batch)


def test_a_loop_over_blocks_is_not_measured(monkeypatch):
    monkeypatch.setattr("biassurgery.adapters.registry._ADAPTERS", [LoopedAdapter()])
    with pytest.raises(UnsupportedModel, match="twice"):
        bs.calibrate(Looped(), batch_of("looped"))


def test_hidden_states_asked_of_the_model_do_not_stand_in_the_way():
    """transformers 4 leaves a bound `forward` on every block after `output_hidden_states=True`."""
    model = tiny_model("granite")
    batch = batch_of("granite")
    plain = forward(model, batch, output_hidden_states=True)
    bs.patch_model(model, "set_zero", sites=SITES)
    changed = forward(model, batch, output_hidden_states=True)
    assert not torch.equal(changed.logits, plain.logits)
    assert torch.equal(changed.hidden_states[2][..., 5], torch.zeros(2, 8))
    assert plain.hidden_states[2][..., 5].abs().min() > 1e-6
    bs.unpatch_model(model)
    assert torch.equal(forward(model, batch).logits, plain.logits)
    assert torch.equal(
        forward(model, batch, output_hidden_states=True).hidden_states[2], plain.hidden_states[2]
    )
