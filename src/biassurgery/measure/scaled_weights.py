"""Which weights of a model are multiplied so that its residual stream is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.observe import observed
from biassurgery.measure.seen_forward import keeping_inputs, run
from biassurgery.measure.writers import NotScaleFree, Weights, graphed, writers
from biassurgery.surgery.rescale import Weight

# What the trial does not run, and is written into the stream where it does: by its name.
_UNSEEN = ("mask_token",)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def found_weights(host: Host, factor: float, batch: Mapping[str, Any]) -> list[Weight]:
    """What is to be multiplied, by the names of the weights in the whole model.

    Raises:
        UnsupportedModel: it cannot be told, or cannot be multiplied; the message says what.
    """
    if any(parameter.is_inference() for parameter in host.root.parameters()):
        raise UnsupportedModel(
            f"model: {type(host.root).__name__} was made under torch.inference_mode(), so that"
            " autograd, by which its weights are told apart, cannot follow them; load it outside."
        )
    hidden: list[Tensor] = []
    read_by_head: list[Tensor] = []
    head = _head(host)
    with (
        graphed(host.root),
        observed(host, lambda _, output: hidden.append(output)),
        keeping_inputs(head, read_by_head),
    ):
        run(host, batch)
        try:
            written = writers(hidden[-1])
        except NotScaleFree as error:
            raise refused(host, f"is written to by {error}") from error
        written |= _siblings(host, written)
        last = _before_head(host, head, read_by_head, written)
    names = {parameter: name for name, parameter in host.root.named_parameters()}
    weights = [
        _weight(host, names, parameter, by, plus_one)
        for group, by in ((written, factor), (last, 1 / factor))
        for parameter, plus_one in group.items()
    ]
    return sorted(weights)


def _before_head(
    host: Host, head: nn.Module | None, read: list[Tensor], written: Weights
) -> Weights:
    """What is divided by the factor: what writes into a head that is the table of tokens."""
    if head is None or not any(parameter in written for parameter in head.parameters()):
        return {}
    if not read:
        raise refused(host, "goes to a tied head whose module the model does not call")
    try:
        last = writers(read[-1])
    except NotScaleFree as error:
        raise refused(host, f"goes to a tied head through {error}") from error
    if any(parameter in written for parameter in last):
        raise refused(host, "goes to a tied head without a norm whose weights could be divided")
    return last


def _siblings(host: Host, written: Weights) -> Weights:
    """Weights that the trial did not run: experts that no token chose, tokens that stand for masks.

    An expert's are those whose names in the block differ in a number only.
    """
    found: Weights = {}
    for block in host.blocks:
        named = dict(block.named_parameters())
        patterns = {_pattern(name): written[p] for name, p in named.items() if p in written}
        found |= {p: patterns[_pattern(n)] for n, p in named.items() if _pattern(n) in patterns}
    inside = {parameter for block in host.blocks for parameter in block.parameters()}
    return found | {
        parameter: False
        for name, parameter in host.model.named_parameters()
        if name.endswith(_UNSEEN) and parameter not in inside
    }


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _weight(
    host: Host, names: dict[nn.Parameter, str], parameter: nn.Parameter, by: float, plus_one: bool
) -> Weight:
    """A weight that is multiplied, if it can be."""
    name = names.get(parameter)
    kind = type(host.root).__name__
    if name is None:
        raise refused(host, "is written to by a weight that is not a parameter of the model")
    if "lora_" in name or ".base_layer." in name:
        raise UnsupportedModel(
            f"model: {kind} has an adapter of PEFT on {name}, which writes into the residual"
            " stream; merge it (model.merge_and_unload()), or rescale before it is adapted."
        )
    if parameter.dtype not in _DTYPES or type(parameter.data) is not Tensor:
        held = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
        raise UnsupportedModel(
            f"model: {name} of {kind} is {held}, in which it cannot be multiplied exactly and taken"
            " back; rescale the model in float32 (or bfloat16) before it is quantised, sharded or"
            " cast, and save it."
        )
    if parameter.is_meta:
        raise UnsupportedModel(
            f"model: {name} of {kind} is not in memory (offloaded); rescale it before that."
        )
    if plus_one and parameter.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModel(
            f"model: {name} of {kind} is {parameter.dtype} and holds w of a norm of 1 + w, which a"
            " factor would round by up to 11 %; load the model in float32, rescale, then cast."
        )
    module, _, attribute = name.rpartition(".")
    return Weight(module, attribute, by, plus_one)


def _head(host: Host) -> nn.Module | None:
    find: Any = getattr(host.root, "get_output_embeddings", None)
    return None if find is None else find()


def refused(host: Host, what: str) -> UnsupportedModel:
    """The error that a model would compute something else."""
    return UnsupportedModel(
        f"model: the residual stream of {type(host.root).__name__}, multiplied by a factor, {what},"
        " so that the model would compute something else; rescale serves models whose blocks read"
        " the stream through norms. It is as it was."
    )
