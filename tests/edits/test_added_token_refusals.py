"""Test-time registers that are refused, and a failure half way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.edits.added_token import AddToken, NeuronEdit
from biassurgery.errors import BadOption, Incompatible, UnsupportedModel
from biassurgery.findings.register_neurons import RegisterNeuron
from tests import vision
from tests.edits.plain_hooks import neurons_of, random_vit
from tests.models import (
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PATCH,
    images,
)
from tests.state import output_of, untouched


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"architecture": "vit"},
            Incompatible,
            "architecture is 'vit', this one's is 'timm_vit'",
        ),
        ({"layers": 12}, Incompatible, "number of layers is 12"),
        ({"width": 192}, Incompatible, "hidden size is 192"),
        (
            {"neurons": (RegisterNeuron(1, 256, 1.0),)},
            Incompatible,
            "256 of layer 1 is outside the 256",
        ),
        (
            {"neurons": (RegisterNeuron(5, 0, 1.0),)},
            Incompatible,
            r"layer=5, .* whose blocks are 0 to 4",
        ),
        ({"neurons": (RegisterNeuron(0, -1, 1.0),)}, Incompatible, "neuron=-1"),
        ({"neurons": ()}, BadOption, "there are none"),
    ],
)
def test_neurons_of_another_model(change, error, message):
    model = random_vit()
    with untouched(model), pytest.raises(error, match=message):
        bs.patch_model(model, "test_time_registers", neurons=replace(neurons_of(model), **change))


def test_what_the_mode_does_not_take():
    model = random_vit()
    neurons = neurons_of(model)
    with untouched(model):
        with pytest.raises(BadOption, match="needs neurons="):
            bs.patch_model(model, "test_time_registers")
        with pytest.raises(BadOption, match="neurons: list; pass what find_register_neurons"):
            bs.patch_model(model, "test_time_registers", neurons=[(1, 2)])
        with pytest.raises(BadOption, match="does not use any"):
            bs.patch_model(
                model,
                "test_time_registers",
                neurons=neurons,
                sites=bs.Sites([bs.Site(0, 1, "patch", 5.0)]),
            )
        with pytest.raises(BadOption, match="leave layers= out"):
            bs.patch_model(model, "test_time_registers", neurons=neurons, layers=[1])
        bs.patch_model(model, "test_time_registers", neurons=neurons)
        for again in (neurons, neurons.first(1)):
            with pytest.raises(
                bs.AlreadyPatched, match="test-time register is on the model already"
            ):
                bs.patch_model(model, "test_time_registers", neurons=again)
        with pytest.raises(bs.AlreadyPatched, match="where its outlier tokens have gone"):
            bs.find_register_neurons(model, images(3).double())
        bs.unpatch_model(model)


def test_tokens_on_another_axis():
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        width=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        mlp_ratio=2,
        output_dim=5,
    )
    for module in model.modules():
        if "batch_first" in vars(module):
            module.batch_first = False  # type: ignore[assignment]
    with untouched(model), pytest.raises(UnsupportedModel, match="axes TBD"):
        bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))


def test_a_replaced_forward_is_refused():
    model = random_vit()
    linear: Any = model.blocks[0].mlp.fc2
    linear.forward = lambda x: x
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match="forward` of the second linear layer"),
    ):
        bs.patch_model(model, "test_time_registers", neurons=neurons_of(model))


def test_a_failure_half_way_leaves_no_trace(monkeypatch):
    model = vision.planted("timm_eva")
    neurons = neurons_of(model)
    attach = NeuronEdit.attach

    def fails(self: NeuronEdit, module: nn.Module) -> None:
        attach(self, module)
        if 31 in self.neurons:
            raise KeyboardInterrupt

    counts = [block.attn.num_prefix_tokens for block in model.blocks]
    with untouched(model, images(2)):
        monkeypatch.setattr(NeuronEdit, "attach", fails)
        with pytest.raises(KeyboardInterrupt):
            bs.patch_model(model, "test_time_registers", neurons=neurons)
        monkeypatch.undo()
    assert [block.attn.num_prefix_tokens for block in model.blocks] == counts
    assert AddToken(1)(torch.ones(2, 3, 4)).sum(2).tolist() == [[4, 0, 4, 4]] * 2


def neurons(model: Any, family: str = "timm_vit") -> bs.RegisterNeurons:
    return bs.find_register_neurons(
        vision.planted(family) if model is None else model, images(4), count=2
    )


def test_backbones_take_no_test_time_register() -> None:
    """They reshape what their blocks return, the added token with it."""
    import transformers as tf

    model = tf.Dinov2Backbone(
        tf.Dinov2Config(
            hidden_size=HIDDEN,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            mlp_ratio=2,
            out_features=["stage2", "stage3"],
        )
    ).eval()
    model.load_state_dict(
        {
            name.removeprefix("dinov2."): p
            for name, p in vision.planted("dinov2").state_dict().items()
        },
        strict=False,
    )
    found = neurons(model)
    with untouched(model), pytest.raises(UnsupportedModel, match="Dinov2Backbone"):
        bs.patch_model(model, "test_time_registers", neurons=found)
    with bs.patched(model, "set_zero", sites=bs.calibrate(model, images(4))), torch.no_grad():
        assert [tuple(each.shape) for each in model(images(2)).feature_maps] == [
            (2, HIDDEN, 4, 4)
        ] * 2


def test_an_added_token_does_not_leave_from_under_what_counts_it() -> None:
    model = vision.planted("timm_vit")
    found = neurons(None)
    bs.patch_model(model, "test_time_registers", neurons=found)
    means = bs.calibrate_registers(model, images(4))
    assert means.values.shape[1] == 3  # two of its own, one that was added
    bs.patch_model(model, "fix_registers", means=means)
    patched = output_of(model, images(2))
    with pytest.raises(BadOption, match=r"'fix_registers'.*unpatch_model"):
        bs.unpatch_model(model, "test_time_registers")
    assert torch.equal(output_of(model, images(2)), patched)
    bs.unpatch_model(model, "fix_registers")
    bs.unpatch_model(model, "test_time_registers")
    assert torch.equal(
        output_of(model, images(2)), output_of(vision.planted("timm_vit"), images(2))
    )


def test_all_at_once_leave_together() -> None:
    model = vision.planted("timm_vit")
    with untouched(model, images(2)):
        bs.patch_model(model, "test_time_registers", neurons=neurons(None))
        bs.patch_model(model, "fix_registers", fill="zero")
        bs.unpatch_model(model)


def test_an_added_token_does_not_move_what_is_written_by_position() -> None:
    model = vision.planted("timm_vit")
    bs.patch_model(model, "set_value", value=1.0, channels=2, positions=7, layers=1)
    with untouched(model), pytest.raises(BadOption, match="set_value"):
        bs.patch_model(model, "test_time_registers", neurons=neurons(None))
    bs.unpatch_model(model)
    bs.patch_model(
        model, "set_value", value=1.0, channels=2, positions=1, layers=1
    )  # a register stays where it is
    assert bs.patch_model(model, "test_time_registers", neurons=neurons(None)) is model
