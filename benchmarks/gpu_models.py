"""The small models that `gpu_checks.py` compares, and every mode with what it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import biassurgery as bs

VOCABULARY = 256
LENGTH = 24
LAYERS = 2
START = {17: 3000.0, 40: -1500.0}  # the massive values of token 0, by channel
# What modes write there: others, so that it shows.
WRITTEN = {
    17: {"start": 1800.0, "elsewhere": 9000.0},
    40: {"start": -2500.0, "elsewhere": -6000.0},
}
SIZE = 32  # pixels of an image
REGISTERS = 4


class Host(NamedTuple):
    """A model on the CPU in float32, and two batches of one shape for it."""

    model: Any
    batches: tuple[Tensor, Tensor]


@cache
def text() -> Host:
    """A LLaMA with grouped heads, whose token 0 carries two massive activations."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        vocab_size=VOCABULARY,
        max_position_embeddings=4 * LENGTH,
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for channel, value in START.items():
            model.get_input_embeddings().weight[0, channel] = value
    ids = torch.randint(1, VOCABULARY, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :, 0] = 0
    return Host(model, (ids[0], ids[1]))


@cache
def image() -> Host:
    """A vision transformer of timm with registers."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=SIZE, patch_size=8, depth=LAYERS, num_classes=10
    ).eval()
    for block in model.blocks:  # at first, what blocks add is next to nothing
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    pixels = torch.randn(2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Host(model, (pixels[0], pixels[1]))


HOSTS = {"text": text, "image": image}


def sites() -> bs.Sites:
    """Both channels at both blocks, with a level each at the start and elsewhere."""
    return bs.Sites(
        bs.Site(layer, channel, role, mean, 0.05 * abs(mean))
        for layer in range(LAYERS)
        for channel, levels in WRITTEN.items()
        for role, mean in levels.items()
    )


@cache
def key_values() -> bs.KeyValues:
    host = text()
    return bs.calibrate_key_values(host.model, host.batches[0], progress=False)


class Case(NamedTuple):
    """A mode on one of the models.

    `random`: its numbers are drawn on the device, so that those of the CPU are others. `changes`:
    whether the logits become others. `float16`: whether it takes a model in float16.
    """

    host: str
    mode: str
    options: Callable[[], dict[str, Any]]
    random: bool = False
    changes: bool = True
    float16: bool = True

    def on(self, model: Any) -> AbstractContextManager[Any]:
        return bs.patched(model, self.mode, **self.options())


def _with_sites(**options: Any) -> dict[str, Any]:
    return {"sites": sites(), "layers": "all", **options}


def _bias(kind: str) -> dict[str, Any]:
    # The same numbers on every device: parameters are drawn on the CPU.
    torch.manual_seed(1)
    if kind == "off_by_one":
        return {"kind": kind}
    # A gate as strong as the others would make rounding errors large.
    return {"kind": kind, "init": "normal", "std": 0.1 if kind == "gate" else 1.0}


def _means() -> dict[str, Any]:
    host = image()
    means = bs.calibrate_registers(host.model, host.batches[0], progress=False)
    return {"means": replace(means, values=means.values + 1)}  # others, so that it shows


CASES = {
    "instrument": Case("text", "instrument", dict, changes=False),
    "set_mean": Case("text", "set_mean", _with_sites),
    "attention_bias kv": Case("text", "attention_bias", partial(_bias, "kv")),
    "transplant": Case("text", "transplant", lambda: {"key_values": key_values()}),
    "set_zero": Case("text", "set_zero", _with_sites),
    "set_value": Case("text", "set_value", partial(_with_sites, value=-2345.0)),
    "noise": Case("text", "noise", _with_sites, random=True),
    "shuffle": Case("text", "shuffle", _with_sites, changes=False),  # the other row's are the same
    "zero_random": Case("text", "zero_random", _with_sites, changes=False),  # small ones
    "pin": Case("text", "pin", _with_sites),
    **{
        f"attention_bias {kind}": Case("text", "attention_bias", partial(_bias, kind))
        for kind in ("k", "v", "sink_logit", "off_by_one", "gate")
    },
    "rescale": Case("text", "rescale", lambda: {"factor": 0.25}, changes=False, float16=False),
    "fix_registers": Case("image", "fix_registers", _means),
    "image: attention_bias kv": Case("image", "attention_bias", partial(_bias, "kv")),
    "image: instrument": Case("image", "instrument", dict, changes=False),
}
FIRST = ("instrument", "set_mean", "attention_bias kv", "transplant")  # the most used
