"""What an adapter makes of a batch, of a call and of an output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.arguments import call
from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import Positions
from biassurgery.adapters.registry import Host, find_host, register_adapter
from biassurgery.errors import BadBatch, UnsupportedModel
from biassurgery.measure.token_positions import shift_edits
from biassurgery.surgery.model import ModelEdit
from tests import models
from tests.adapters.unheard import Unheard, UnheardAdapter

IDS = models.tokens(rows=2, length=6, delimiter_at=None)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


class Renamed(Unheard):
    """The same, with another name for its token ids, and a mask and positions of its own."""

    def forward(self, idx: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        self.counted = position_ids
        return super().forward(idx)


class Turned(Renamed):
    """The same with an embedding of positions, which count padding where none are given."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Identity()

    def forward(self, idx: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        own = torch.arange(idx.shape[1])[None]
        self.turn(own if position_ids is None else position_ids)
        return super().forward(idx, attention_mask, position_ids)


class RenamedAdapter(UnheardAdapter):
    ids = "idx"


def test_labels_stay_behind_and_the_ids_get_the_hosts_name() -> None:
    adapter = RenamedAdapter()
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": LEFT}
    inputs = adapter.inputs(Renamed(), batch)
    assert list(inputs) == ["idx", "attention_mask"]
    assert inputs["idx"] is IDS
    assert inputs["attention_mask"] is LEFT
    assert adapter.canonical({"idx": IDS, "attention_mask": LEFT}).keys() == inputs.keys() - {
        "idx"
    } | {"input_ids"}


def test_a_call_is_a_batch_by_position_and_by_name() -> None:
    """As `record` reads it: what a forward was called with, under this library's names."""

    class Watch(ModelEdit):
        def enter(self, arguments: dict[str, Any]) -> None:
            self.arguments = arguments

    model = Renamed()
    watch = Watch()
    watch.attach(model)
    model(IDS % 20, LEFT)
    watch.detach(model)
    batch = RenamedAdapter().canonical(watch.arguments)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert torch.equal(batch["input_ids"], IDS % 20)
    assert batch["attention_mask"] is LEFT


def test_positions_are_counted_from_the_first_real_token_whatever_the_ids_are_called() -> None:
    class Positioned(RenamedAdapter):
        def positions(self, model: nn.Module) -> Positions:
            return [(model.turn, ("positions", 0))]  # type: ignore[list-item]

    model = Turned()
    host = Host(model, model, None, Positioned(), (), "renamed", 16, (), "BTD")
    (_, _, _), (_, body, count) = shift_edits(host)
    assert body is model
    count.attach(model)
    model(IDS % 20, attention_mask=LEFT)
    assert model.counted.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    count.detach(model)
    model(IDS % 20, attention_mask=LEFT)
    assert model.counted is None


def test_what_says_nothing_is_left_out_where_it_is_not_taken() -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": None}
    assert list(UnheardAdapter().inputs(Unheard(), batch)) == ["input_ids"]


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids"])
def test_what_would_matter_is_refused_where_it_is_not_taken(name: str) -> None:
    with pytest.raises(BadBatch, match=rf"batches: .*{name}.*Unheard"):
        UnheardAdapter().inputs(Unheard(), {"input_ids": IDS, name: LEFT})


def test_a_decoder_of_transformers_reads_padding_at_the_positions_of_its_real_tokens() -> None:
    model = models.planted("gpt2")
    adapter = find_host(model).adapter
    plain = adapter.inputs(model, {"input_ids": IDS, "labels": IDS})
    assert plain.keys() == {"input_ids", "use_cache"}
    assert plain["use_cache"] is False
    padded = adapter.inputs(model, {"input_ids": IDS, "attention_mask": LEFT})
    assert padded["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    given = adapter.inputs(
        model, {"input_ids": IDS, "attention_mask": LEFT, "position_ids": IDS, "use_cache": True}
    )
    assert given["position_ids"] is IDS
    assert given["use_cache"] is True


def test_logits_in_a_tuple_are_those_of_other_libraries_only() -> None:
    logits = torch.zeros(2, 6, 20)
    assert UnheardAdapter().logits(Unheard(), (logits, None)) is logits
    assert UnheardAdapter().logits(Unheard(), logits) is logits
    model = models.planted("llama")
    adapter = find_host(model).adapter
    with pytest.raises(UnsupportedModel, match="returns tuple, which has no logits"):
        adapter.logits(model, model.model(IDS, return_dict=False))
    with torch.no_grad():
        output = model(IDS)
    assert adapter.logits(model, output) is output.logits


@pytest.mark.parametrize(
    ("family", "context", "learned"),
    [("llama", 256, False), ("gpt2", 256, True), ("opt", 256, True), ("mpt", 256, False)],
)
def test_the_context_and_whether_it_is_the_end(family: str, context: int, learned: bool) -> None:
    model = models.planted(family)
    adapter = find_host(model).adapter
    assert adapter.context(model) == context
    assert adapter.learned_positions(model) is learned
    assert adapter.vocabulary(model) == models.VOCAB


def test_the_attentions_of_a_hybrid_are_those_of_the_layers_that_attend() -> None:
    import transformers

    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip("this version of transformers has no Lfm2")
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    config = transformers.Lfm2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=kinds,
    )
    host = find_host(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert host.adapter.recurrent(host.model)
    by_layer = attentions(host)
    assert list(by_layer) == [1, 3]
    assert [by_layer[layer].module for layer in (1, 3)] == [
        host.blocks[layer].get_submodule("self_attn") for layer in (1, 3)
    ]
    with pytest.raises(UnsupportedModel, match="0 modules that call"):
        attentions(host, [0])


def test_blocks_that_share_an_attention_are_refused() -> None:
    model: nn.Module = models.planted("llama")
    blocks = models.blocks(model, "llama")
    blocks[3].self_attn = blocks[1].self_attn
    with pytest.raises(UnsupportedModel, match=r"blocks 1 and 3 .* share one attention"):
        attentions(find_host(model))
    assert list(attentions(find_host(model), [0, 1, 2])) == [0, 1, 2]


def test_ids_that_a_forward_takes_by_position_only() -> None:
    class ByPosition(Unheard):
        def forward(self, ids: Tensor, /, scale: float = 1.0) -> Tensor:
            return super().forward(ids) * scale

    class ByPositionAdapter(UnheardAdapter):
        family = "by_position"
        ids = "ids"

        def matches(self, model: nn.Module) -> bool:
            return isinstance(model, ByPosition)

    register_adapter(ByPositionAdapter)
    torch.manual_seed(0)
    model = ByPosition()
    plain = Unheard()
    plain.load_state_dict(model.state_dict())
    ids = IDS % 20
    found = bs.detect(model, ids)
    assert found.tokens == ids.numel()
    assert len(found.layers) == len(find_host(model).blocks)
    with bs.record(model, "block_output") as rec:
        assert torch.equal(model(ids), plain(ids))
    assert len(rec["block_output"]) == len(found.layers)
    assert call(model, {"ids": ids, "scale": 2.0}).equal(2 * plain(ids))
    assert call(nn.DataParallel(model), {"ids": ids}, model).equal(plain(ids))
