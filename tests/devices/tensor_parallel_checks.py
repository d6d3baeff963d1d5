"""Tensor parallelism: two ranks compute one model of transformers, each its share of the heads.

Every number is compared with that of the whole model in one process.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from biassurgery.extend import Bias
from tests.models import CHANNEL, HEADS, LAYERS, planted, tokens

LARGE = 1e-4  # an effect must be beyond this,
SMALL = 5e-6  # an error, relative to the largest value, below this
KINDS = ("kv", "k", "v", "sink_logit", "gate")


class ByQueries(Bias):
    """A kind of another package, whose column and change read the call."""

    kind = "by_queries"

    def build(self, shape: Any, initial: Any) -> None:
        self.scale = initial(shape.heads)

    def columns(self, call: Any) -> Any:
        from biassurgery.extend import Columns

        return Columns(self.scale[:, None, None] * call.q.mean(-1, keepdim=True), None, None)

    def change(self, call: Any, out: Tensor, attention_input: Tensor | None) -> Tensor:
        return out + self.scale[:, None, None] * call.v.mean(2, keepdim=True).repeat_interleave(
            call.q.shape[1] // call.v.shape[1], 1
        )


def prepare(folder: Path) -> None:
    """What one process has: the models in a folder, and what is measured on them."""
    model = planted("llama")
    model.save_pretrained(folder / "llama")
    bs.calibrate(model, [tokens()]).save(folder / "sites")
    bs.calibrate_key_values(model, [tokens()]).save(folder / "key_values")
    sinks = bs.detect(model, [tokens()]).sinks
    assert sinks is not None
    torch.save([tables(layer) for layer in sinks.layers], folder / "sinks")


def tables(layer: Any) -> Tensor:
    return torch.tensor([layer.attention, layer.sink, layer.on_massive], dtype=torch.float64)


def split(folder: Path, family: str = "llama") -> Any:
    """A planted model, split over the ranks."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # how both versions spell it
        model = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto").eval()
    split_up: list[Any] = [
        parameter for parameter in model.parameters() if hasattr(parameter, "to_local")
    ]
    assert len(split_up) > LAYERS
    assert any(parameter.to_local().numel() < parameter.numel() for parameter in split_up)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def same_on_ranks(x: Tensor) -> bool:
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x.contiguous())
    return all(other.equal(x) for other in others)


def close(one: Tensor, other: Tensor, error: float = SMALL) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=error * max(1.0, other.abs().max().item()))


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Those that patches added."""
    return {name: value for name, value in model.named_parameters() if "attention_bias" in name}


def patched_alike(folder: Path, *kinds: str, **options: Any) -> tuple[Any, Any]:
    """The split model and the whole one, with biases of the same random values."""
    model, whole = split(folder), planted("llama")
    torch.manual_seed(dist.get_rank())  # each rank draws others
    for kind in kinds:
        bs.patch_model(model, "attention_bias", kind=kind, **options)
        bs.patch_model(whole, "attention_bias", kind=kind, **options)
    theirs = parameters_of(model)
    assert all(same_on_ranks(value.detach()) for value in theirs.values())
    with torch.no_grad():
        for name, value in parameters_of(whole).items():
            value.copy_(theirs[name])
    return model, whole


def activations(folder: Path) -> None:
    ids = tokens()
    model, whole = split(folder), planted("llama")
    plain = logits(model, ids)
    close(plain, logits(whole, ids))
    sites, expected = bs.calibrate(model, [ids]), bs.Sites.load(folder / "sites")
    assert len(sites) == len(expected)
    for one, other in zip(sites, expected):
        assert (one.layer, one.channel, one.role) == (other.layer, other.channel, other.role)
        assert one.count == other.count  # ranks that read the same count once
        assert abs(one.mean / other.mean - 1) < 1e-5
    modes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("set_mean", {}),
        ("set_zero", {"layers": "all"}),
        ("set_value", {"value": 70.0}),
        ("set_value", {"value": 9.0, "channels": 3, "positions": (0, 4), "layers": [2]}),
        ("zero_random", {}),
    )
    for mode, options in modes:
        given = {} if "positions" in options else {"sites": expected}
        with (
            bs.patched(model, mode, **given, **options),
            bs.patched(whole, mode, **given, **options),
        ):
            close(logits(model, ids), logits(whole, ids))
            assert mode == "set_mean" or (logits(model, ids) - plain).abs().max() > LARGE
        assert logits(model, ids).equal(plain)


def random_modes(folder: Path) -> None:
    """What is drawn at random is the same on all ranks, which seed differently."""
    ids = tokens()
    model = split(folder)
    plain = logits(model, ids)
    sites = bs.Sites.load(folder / "sites")
    torch.manual_seed(dist.get_rank())
    modes: tuple[tuple[str, dict[str, Any]], ...] = (("noise", {"scale": 300.0}), ("shuffle", {}))
    for mode, options in modes:
        with bs.patched(model, mode, sites=sites, **options), bs.record(model, "block_output") as r:
            changed = logits(model, ids)
        assert same_on_ranks(changed)
        assert all(same_on_ranks(hidden) for hidden in r["block_output"].values())
        assert (changed - plain).abs().max() > LARGE, mode
    assert logits(model, ids).equal(plain)


def instrument(folder: Path) -> None:
    ids = tokens()
    model = split(folder)
    plain = logits(model, ids)
    with bs.patched(model, "instrument"):
        close(logits(model, ids), plain)
    assert logits(model, ids).equal(plain)


def biases(folder: Path) -> None:
    """Each kind: logits, the loss's gradients, undone bit by bit."""
    ids = tokens()
    for kind in (*KINDS, "by_queries", "off_by_one"):
        options = {} if kind == "off_by_one" else {"init": "normal", "std": 1.0}
        model, whole = patched_alike(folder, kind, **options)
        _compare(model, whole, ids, kind)
        bs.unpatch_model(model)
        model.zero_grad(set_to_none=True)
        fresh = split(folder)
        assert logits(model, ids).equal(logits(fresh, ids)), kind
        assert model.state_dict().keys() == fresh.state_dict().keys()


def stacked_biases(folder: Path) -> None:
    model, whole = patched_alike(
        folder, "kv", "sink_logit", "gate", "v", "by_queries", init="normal", std=0.5
    )
    _compare(model, whole, tokens(), "all")


def _compare(model: Any, whole: Any, ids: Tensor, kind: str) -> None:
    plain = logits(planted("llama"), ids)
    assert (logits(whole, ids) - plain).abs().max() > LARGE, kind
    close(logits(model, ids), logits(whole, ids))
    for one in (model, whole):
        one(ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert gradient is not None, name
        assert gradient.shape == expected[name].shape, name
        largest = expected[name].grad.abs().max()
        assert "attention_bias" not in name or largest > 0, name
        close(
            gradient / largest.clamp(min=1e-4), expected[name].grad / largest.clamp(min=1e-4), 1e-4
        )


def training_step(folder: Path) -> None:
    """A step of the biases alone leaves the ranks with the same ones, and those of one process."""
    ids = tokens()
    model, whole = patched_alike(folder, "kv", init="normal", trainable="bias")
    for one in (model, whole):
        before = {name: value.detach().clone() for name, value in parameters_of(one).items()}
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        one(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        after = parameters_of(one)
        assert after
        assert all(not value.equal(before[name]) for name, value in after.items())
    for name, value in parameters_of(model).items():
        assert same_on_ranks(value.detach())
        close(value, parameters_of(whole)[name], 1e-3)  # Adam's first step is the gradient's sign
    close(logits(model, ids), logits(whole, ids), 1e-3)


def recorded(folder: Path) -> None:
    """Every quantity has the heads of all ranks; also its gradient."""
    ids = tokens()
    model, whole = patched_alike(folder, "kv", "sink_logit", init="normal", std=1.0)
    heads = ("q", "k", "v", "logits", "probs", "sink_mass", "bias_mass", "value_updates")
    what = (*heads, "block_input", "block_output", "norm_output", "attention_output")
    with torch.no_grad(), bs.record(model, what) as ours, bs.record(whole, what) as theirs:
        model(ids)
        whole(ids)
    for name in what:
        for layer in range(LAYERS):
            one, other = ours[name][layer], theirs[name][layer]
            assert one.shape == other.shape, name
            seen = other.isfinite()
            assert one.isfinite().equal(seen), name
            close(one[seen], other[seen])
    gradients = []
    for one in (model, whole):
        with bs.record(one, "sink_mass", [2], detach=False) as rec:
            one(ids)
        assert rec["sink_mass"][2].shape[1] == HEADS
        rec["sink_mass"][2][:, :, 5:].sum().backward()
        gradient = one.model.layers[0].self_attn.v_proj.weight.grad
        gradients.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    close(gradients[0] / gradients[1].abs().max(), gradients[1] / gradients[1].abs().max(), 1e-4)


def detected(folder: Path) -> None:
    found = bs.detect(split(folder), [tokens()])
    assert found.sinks is not None
    expected = torch.load(folder / "sinks")
    assert len(expected) == LAYERS
    for layer, other in zip(found.sinks.layers, expected):
        assert len(layer.attention) == HEADS
        close(tables(layer), other)
    assert {site.channel for site in found.sites} == {CHANNEL}


def transplanted(folder: Path) -> None:
    ids = tokens(delimiter_at=None)
    model, whole = split(folder), planted("llama")
    plain = logits(model, ids)
    measured = bs.calibrate_key_values(model, [tokens()])
    expected = bs.KeyValues.load(folder / "key_values")
    assert measured.count == expected.count
    close(measured.keys, expected.keys)
    close(measured.values, expected.values)
    for one in (model, whole):
        bs.patch_model(one, "transplant", key_values=expected)
    close(logits(model, ids[:, 1:]), logits(whole, ids[:, 1:]))
    close(logits(model, ids[:, 1:]), plain[:, 1:], 1e-4)
    prompt = {"input_ids": ids[:1, 1:], "attention_mask": torch.ones_like(ids[:1, 1:])}
    written = [one.generate(**prompt, max_new_tokens=4, do_sample=False) for one in (model, whole)]
    assert written[0].equal(written[1])
    bs.unpatch_model(model)
    assert logits(model, ids).equal(plain)


def files(folder: Path) -> None:
    """A patch saved on any number of ranks loads on any other."""
    ids = tokens()
    model, whole = patched_alike(folder, "kv", "gate", init="normal", std=1.0)
    bs.save_patch(model, folder / "of_two")
    bs.save_patch(whole, folder / f"of_one_{dist.get_rank()}")
    dist.barrier()
    for name, host in (("of_two", planted("llama")), (f"of_one_{dist.get_rank()}", split(folder))):
        bs.load_patch(host, folder / name)
        close(logits(host, ids), logits(whole, ids))


def refused(folder: Path) -> None:
    """Residual streams that are split by tokens, and heads that are counted by no config."""
    from timm.models.vision_transformer import VisionTransformer

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    ids = tokens()
    model = planted("llama")
    whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
    plan = {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": PrepareModuleInput(**whole),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    sites = bs.Sites.load(folder / "sites")
    for verb in (
        lambda: bs.patch_model(model, "set_mean", sites=sites),
        lambda: bs.patch_model(model, "attention_bias", kind="kv"),
        lambda: bs.calibrate(model, [ids]),
        lambda: bs.detect(model, [ids]),
        lambda: bs.calibrate_key_values(model, [ids]),
        lambda: bs.record(model, "block_output").__enter__(),
    ):
        with pytest.raises(UnsupportedModel, match="sequence-parallel"):
            verb()
    assert bs.patches(model) == ()
    vit = VisionTransformer(img_size=28, patch_size=7, embed_dim=64, depth=2, num_heads=4).eval()
    layers: Any = vit.blocks
    for block in layers:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    for verb in (
        lambda: bs.patch_model(vit, "attention_bias", kind="kv"),
        lambda: bs.record(vit, "probs").__enter__(),
    ):
        with pytest.raises(UnsupportedModel, match="tensor-parallel ranks"):
            verb()
    with pytest.raises(UnsupportedModel, match="tensor-parallel ranks"):
        bs.find_register_neurons(vit, torch.randn(2, 3, 28, 28))


def torchs_own(folder: Path) -> None:
    """Tensor parallelism by torch's `parallelize_module`, without a word of transformers'."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    ids = tokens()
    model, whole = planted("llama"), planted("llama")
    plan: dict[str, Any] = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    plan["o_proj"] = RowwiseParallel()
    for block in model.model.layers:
        parallelize_module(block.self_attn, mesh, plan)
    for one in (model, whole):
        torch.manual_seed(3)
        bs.patch_model(one, "attention_bias", kind="kv", init="normal", std=1.0)
    _compare(model, whole, ids, "kv")
    with bs.record(model, "probs") as rec:
        logits(model, ids)
    assert rec["probs"][0].shape[1] == HEADS


FAST = (
    activations,
    random_modes,
    stacked_biases,
    recorded,
    detected,
    transplanted,
    files,
    refused,
)
LONG = (instrument, biases, training_step, torchs_own)
CHECKS = FAST + LONG
