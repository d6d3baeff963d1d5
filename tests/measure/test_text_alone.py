"""Models whose blocks partly attend to images (mllama), on text alone: those blocks do not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import biassurgery as bs
from biassurgery.errors import BadBatch, UnsupportedModel

CROSSING = 1
START, CHANNEL = 1, 7
TEXT = [0, 2, 3]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = MllamaTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[CROSSING],
        rope_scaling={"rope_type": "default"},
        pad_token_id=0,
    )
    made = transformers.MllamaForCausalLM(config).eval()
    with torch.no_grad():
        made.get_input_embeddings().weight[START, CHANNEL] = 500.0
    return made


def text() -> Tensor:
    ids = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = START
    return ids


def with_image() -> dict[str, Tensor]:
    states = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(4))
    return {"input_ids": text(), "cross_attention_states": states}


def by_hand(model: Any) -> dict[int, float]:
    """The mean of the planted value after each block that runs, by plain hooks."""
    seen: dict[int, float] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            seen[layer] = hidden[:, 0, CHANNEL].double().mean().item()

        return hook

    handles = [
        block.register_forward_hook(keep(layer)) for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(text())
    for handle in handles:
        handle.remove()
    return seen


def test_calibrate(model: Any) -> None:
    with pytest.warns(UserWarning, match=r"blocks \[1\] attend to images and did not run"):
        sites = bs.calibrate(model, text())
    assert {site.layer: site.mean for site in sites} == pytest.approx(by_hand(model), rel=1e-6)
    assert sites.layers() == TEXT
    with pytest.warns(UserWarning, match="attend to images"):
        assert len(bs.calibrate(model, text(), resume=sites)) == len(sites)


@pytest.mark.filterwarnings("ignore:model. blocks")
def test_detect(model: Any) -> None:
    found = bs.detect(model, text())
    assert [summary.layer for summary in found.layers] == TEXT
    assert found.layers[1].top[0] == pytest.approx(by_hand(model)[2], rel=1e-6)
    assert found.sinks is not None
    assert [layer.layer for layer in found.sinks.layers] == TEXT
    # The tokens that are massive after block 0 are so before block 2.
    assert [layer.massive_tokens for layer in found.sinks.layers][1:] == [2, 2]
    assert str(found)


def test_record_and_patch(model: Any) -> None:
    with bs.record(model, ("block_output", "sink_mass")) as rec:
        model(text())
    assert [layer for layer in range(4) if layer in rec["block_output"]] == TEXT
    with pytest.warns(UserWarning, match="attend to images"):
        sites = bs.calibrate(model, text())
    before = model(text()).logits
    with bs.patched(model, "set_mean", sites=sites, layers="all"):
        assert (model(text()).logits - before).abs().max() < 1e-4
    with bs.patched(model, "set_zero", sites=sites, layers="all"):
        assert (model(text()).logits - before).abs().max() > 1e-3
    assert torch.equal(model(text()).logits, before)


def test_with_an_image_all_blocks_count(model: Any) -> None:
    assert [summary.layer for summary in bs.detect(model, with_image()).layers] == [0, 1, 2, 3]
    with pytest.raises(BadBatch, match=r"blocks \[1\] attend to images, which some batches have"):
        bs.calibrate(model, [with_image(), {"input_ids": text()}])


def test_key_values_are_refused_with_the_reason(model: Any) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"blocks \[1\] of MllamaForCausalLM attend to image"
    ):
        bs.calibrate_key_values(model, text())


def test_a_layer_that_is_skipped_otherwise_is_still_refused(model: Any) -> None:
    model.config.cross_attention_layers = []
    with pytest.raises(UnsupportedModel, match="skipped at random"):
        bs.calibrate(model, text())
