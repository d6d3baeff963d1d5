"""Everything that reads or changes a model, on a pretended GPU and over two of them: the numbers of
the CPU, and no mixing of devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.measure.quantities import QUANTITIES
from tests import models, vision
from tests.contract.cases import CASES, Case, parametrize
from tests.devices.pretended import GPU, SECOND, Pretended, back, first, gpus, sent

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a GPU is there, which needs no pretending"
    ),
    pytest.mark.skipif(
        not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="this torch cannot pretend"
    ),
]

FAMILIES = (
    "llama",
    "gpt2",
    "timm_vit",
    "dinov2_with_registers",
)  # grouped heads, learned positions, no prefix to speak of, registers
TEXT = FAMILIES[:2]
SPLIT = 3  # the first block on the second GPU
RANDOM = (
    "noise",
    "fix_registers noise",
    "zero_random",
    "attention_bias gate",
)  # what is drawn on a device depends on it

NAMES = tuple(QUANTITIES)


def case_of(family: str) -> Case:
    return Case(family, "set_mean")


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    return (vision.blocks if family in vision.FAMILIES else models.blocks)(model, family)


def over_two(family: str) -> Any:
    """A planted model whose later blocks are on a second GPU, sent there by accelerate's hooks."""
    model = case_of(family).model()
    stack = blocks(model, family)
    far = {id(module) for block in stack[SPLIT:] for module in block.modules()}
    inside = {id(module) for block in stack for module in block.modules()}
    paths = {path: id(module) for path, module in model.named_modules()}
    sent(model, lambda path: SECOND if paths[path] in far else GPU)
    for layer, block in enumerate(stack):
        add_hook_to_module(block, AlignDevicesHook(SECOND if layer >= SPLIT else GPU))
    for module in list(model.modules()):
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook(GPU))
    add_hook_to_module(model, AlignDevicesHook(GPU, io_same_device=True))
    return model


def on_one(family: str) -> Any:
    return sent(case_of(family).model())


PLACES = {"one": on_one, "two": over_two}
everywhere = pytest.mark.parametrize("place", PLACES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def near(found: Tensor, wanted: Tensor) -> None:
    assert isinstance(found, Pretended)
    torch.testing.assert_close(back(found), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "made", [lambda: torch.zeros(3), lambda: torch.zeros(3, device=SECOND)], ids=["cpu", "second"]
)
def test_devices_do_not_mix(made: Any) -> None:
    with gpus():
        here = torch.ones(3, device="cuda")
        assert here.device == GPU
        assert back(here + torch.tensor(2.0)).tolist() == [3.0] * 3
        with pytest.raises(RuntimeError, match="same device"):
            here + made()


# Rescale moves exponents of plain tensors, and refuses what is none, as these.
@everywhere
@parametrize([c for c in CASES if c.family in FAMILIES and not c.on_weights])
def test_every_mode(case: Case, place: str) -> None:
    batch = case.batch()
    plain = first(case.model()(batch)).detach()
    wanted = first(case.patched()(batch)).detach()
    with gpus():
        model = PLACES[place](case.family)
        near(first(model(batch.to(GPU))), plain)
        case.patch(model)
        found = first(model(batch.to(GPU)))
        bs.unpatch_model(model)
        near(first(model(batch.to(GPU))), plain)
    if case.variant in RANDOM:
        assert not torch.allclose(back(found), plain)
    else:
        near(found, wanted)


@everywhere
@every_family
def test_sites(family: str, place: str) -> None:
    case = case_of(family)
    batch = case.batch(4)
    reference, wanted = (case.model(), bs.calibrate(case.model(), case.batch(4)))
    report = bs.detect(reference, batch)
    with gpus():
        model = PLACES[place](family)
        for given in (batch, batch.to(GPU)):  # from wherever the user has it
            found = bs.calibrate(model, given)
            assert [(s.layer, s.channel, s.role, s.count) for s in found] == [
                (s.layer, s.channel, s.role, s.count) for s in wanted
            ]
            assert [s.mean for s in found] == pytest.approx([s.mean for s in wanted], rel=1e-3)
        seen = bs.detect(model, batch)
    assert [layer.median for layer in seen.layers] == pytest.approx(
        [layer.median for layer in report.layers], rel=1e-3
    )
    assert [layer.top for layer in seen.layers] == [
        pytest.approx(layer.top, rel=1e-3) for layer in report.layers
    ]


@everywhere
@every_family
@pytest.mark.parametrize("device", [None, "cpu"])
def test_record(family: str, place: str, device: str | None) -> None:
    case = case_of(family)
    batch = case.batch()
    reference = case.model()
    with bs.record(reference, NAMES) as wanted, torch.no_grad():
        reference(batch)
    with gpus():
        model = PLACES[place](family)
        with bs.record(model, NAMES, device=device) as found:
            model(batch.to(GPU))
    for name in NAMES:
        for layer, tensor in wanted[name].items():
            where = device or str(SECOND if place == "two" and layer >= SPLIT else GPU)
            assert str(found[name][layer].device) == where
            torch.testing.assert_close(back(found[name][layer]), tensor, rtol=1e-3, atol=1e-3)


@everywhere
@pytest.mark.parametrize("family", TEXT)
def test_transplant_decodes(family: str, place: str) -> None:
    case = case_of(family)
    ids = case.batch(3)
    reference = case.model()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    keys = bs.calibrate_key_values(reference, ids)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": models.PAD_ID}
    bs.patch_model(reference, "transplant", key_values=keys)
    wanted = reference.generate(ids[:, 1:], attention_mask=mask[:, 1:], **options)
    with gpus():
        model = PLACES[place](family)
        found = bs.calibrate_key_values(model, ids.to(GPU))
        torch.testing.assert_close(found.keys, keys.keys, rtol=1e-3, atol=1e-3)
        bs.patch_model(model, "transplant", key_values=found)
        assert torch.equal(
            back(model.generate(ids[:, 1:].to(GPU), attention_mask=mask[:, 1:].to(GPU), **options)),
            wanted,
        )


@everywhere
def test_streaming(place: str) -> None:
    ids = models.tokens(1, 20)
    reference = models.planted("llama")
    wanted = bs.streaming_perplexity(reference, ids, bs.SinkCache(reference, 8, 2))
    with gpus():
        model = PLACES[place]("llama")
        assert bs.streaming_perplexity(model, ids, bs.SinkCache(model, 8, 2)) == pytest.approx(
            wanted, rel=1e-3
        )
        assert bs.perplexity(model, ids) == pytest.approx(bs.perplexity(reference, ids), rel=1e-3)


@everywhere
@pytest.mark.parametrize("mode", ["set_mean", "attention_bias"])
@every_family
def test_saving(family: str, mode: str, place: str, tmp_path: Path) -> None:
    """What is saved on a GPU is loaded on a CPU, and back."""
    case = Case(family, "attention_bias kv" if mode == "attention_bias" else mode)
    batch = case.batch()
    reference = case.model()
    with gpus():
        model = PLACES[place](family)
        case.patch(model)
        bs.save_patch(model, tmp_path)
        patched = first(model(batch.to(GPU)))
        bs.unpatch_model(model)
        bs.load_patch(model, tmp_path)
        near(first(model(batch.to(GPU))), back(patched))
    bs.load_patch(reference, tmp_path)
    near(patched, first(reference(batch)).detach())


@everywhere
def test_registers(place: str) -> None:
    case = case_of("dinov2_with_registers")
    batch = case.batch(4)
    reference = case.model()
    wanted = bs.calibrate_registers(reference, batch)
    neurons = bs.find_register_neurons(reference, batch, count=2)
    labels = torch.tensor([0, 1, 0, 1])
    with gpus():
        model = PLACES[place](case.family)
        torch.testing.assert_close(
            bs.calibrate_registers(model, batch).values, wanted.values, rtol=1e-3, atol=1e-3
        )
        found = bs.find_register_neurons(model, batch.to(GPU), count=2)
        assert [(each.layer, each.neuron) for each in found.neurons] == [
            (each.layer, each.neuron) for each in neurons.neurons
        ]
        assert bs.top1_accuracy(model, [(batch, labels)]) == bs.top1_accuracy(
            reference, [(batch, labels)]
        )
        near(bs.cls_attention(model, batch.to(GPU)).to(GPU), bs.cls_attention(reference, batch))
