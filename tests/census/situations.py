"""Transplant and a bias of kind kv in the situations that people run models in: with a mask, behind
padding, continuing a cache. Each against the unpatched model.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from tests.census.tiny import needs_cache, tiny_model

LENGTH = 8
PADDING = 2
START = 7  # the id of the start token
RIGHT = "right"
TOLERANCE = 1e-4  # of the largest logit
EFFECT = 5e-4  # what a bias, and a start token, must do at least
# How a cached sequence is cut: a prompt, several tokens, a single one; some hybrids take single
# tokens only.
CUTS = ((LENGTH - 3, 2, 1), (LENGTH - 3, 1, 1, 1))


# By names of weights: queries, keys, values and outputs; what follows a shared block (Zamba).
LOUDER = {"attn": 10.0, "attention": 10.0, "linear.weight": 300.0}


def situations(model_type: str) -> dict[str, str]:
    """What becomes of both modes on a tiny model of the type: `right`, or `refused: ` and why.

    Raises:
        AssertionError: a number is wrong.
    """
    model = audible(tiny_model(model_type))
    return {"kv": verdict(biased, model), "transplant": verdict(transplanted, model)}


def verdict(check: Callable[[nn.Module], None], model: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(model)
        except bs.SurgeryError as refusal:
            reason = str(refusal).split("\n")[0]
            return "refused: " + re.sub(r"off by [\d.e+-]+", "off by some share", reason)
    return RIGHT


@torch.no_grad()
def audible(model: nn.Module) -> nn.Module:
    """The model with attentions that matter: at the scale of fresh weights they are uniform."""
    host = find_host(model)
    for block in host.blocks:
        for name, parameter in block.named_parameters():
            factor = next((LOUDER[part] for part in LOUDER if part in name), None)
            if factor and parameter.dim() == 2:
                parameter.mul_(factor)
    return model


def words(start: bool) -> Tensor:
    """(2, LENGTH) ids, all different, or with a start token before each row."""
    ids = 10 + torch.randperm(40, generator=torch.Generator().manual_seed(3))[: 2 * LENGTH]
    rows = ids.view(2, LENGTH)
    return torch.cat((torch.full((2, 1), START), rows), 1) if start else rows


def biased(model: nn.Module) -> None:
    """A bias without effect is none, and one with an effect has the same in every situation."""
    ids = words(False)
    plain = read(model, ids)
    with bs.patched(model, "attention_bias", kind="kv", init="zero_effect"):
        silent = read(model, ids)
        for name in plain:
            found = silent[name]
            # Where a model forgets positions (Bamba's cache, given none), those of the sequence
            # alone are as right.
            errors = [off(found, plain[situation]) for situation in (name, "alone")]
            assert min(errors) < TOLERANCE, f"kv without effect, {name}: off by {errors}"
    torch.manual_seed(1)
    with bs.patched(model, "attention_bias", kind="kv", init="normal", std=3.0):
        patched = read(model, ids)
    assert off(patched["alone"], plain["alone"]) > EFFECT
    for name in plain.keys() - {"alone"}:
        # A model that reads a sequence in another way where it is padded, does so with a bias.
        if off(plain[name], plain["alone"]) < TOLERANCE:
            assert_same(patched[name], patched["alone"], f"kv, {name}")


def transplanted(model: nn.Module) -> None:
    """Without its start token the model computes what it did behind it."""
    with_token = read(model, words(True), start=1)
    key_values = bs.calibrate_key_values(model, words(True), progress=False)
    ids = words(False)
    cut_off = read(model, ids)
    with bs.patched(model, "transplant", key_values=key_values):
        found = read(model, ids)
    assert off(cut_off["alone"], with_token["alone"]) > EFFECT
    for name in with_token.keys() & cut_off.keys():
        output = found[name]
        # Learned positions count padding, unless they are given; then the sequence alone is right.
        errors = [off(output, with_token[situation]) for situation in (name, "alone")]
        assert min(errors) < TOLERANCE, f"transplant, {name}: off by {errors}"


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, start: int = 0) -> dict[str, Tensor]:
    """The logits (2, LENGTH, V) in every situation, those of `start` first tokens left out."""
    found = {"alone": run(model, ids)}
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        return {name: output[:, start:] for name, output in found.items()}
    found["mask"] = run(model, ids, torch.ones_like(ids))
    rows = ids.shape[1]
    behind = torch.full((2, rows + PADDING), 9)
    mask = torch.zeros_like(behind)
    for row, before in enumerate((PADDING, PADDING - 1)):  # and the rest behind
        behind[row, before : before + rows] = ids[row]
        mask[row, before : before + rows] = 1
    padded, other = (
        unpadded(run(model, behind.where(mask.bool(), torch.tensor(pad)), mask), rows)
        for pad in (8, 9)
    )
    if off(other, padded) < TOLERANCE:  # some recurrent layers read padding, whatever the mask says
        found["padding"] = padded
    left = torch.cat((torch.full((1, PADDING), 9), ids[:1]), 1)
    left_mask = torch.ones_like(left)
    left_mask[:, :PADDING] = 0
    for tokens, given, name in ((ids, None, "cache"), (left, left_mask, "cache behind padding")):
        output = cached(model, tokens, given, rows - LENGTH)
        if output is not None:
            found[name] = torch.cat((output[:, -rows:], found["alone"][len(output) :]))
    return {name: output[:, start:] for name, output in found.items()}


def unpadded(output: Tensor, rows: int) -> Tensor:
    return torch.stack([output[0, PADDING:], output[1, PADDING - 1 : PADDING - 1 + rows]])


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **cache: Any) -> Tensor:
    torch.manual_seed(0)
    options = cache or ({} if needs_cache(model) else {"use_cache": False})
    given = {} if mask is None else {"attention_mask": mask}
    return model(input_ids=ids, **given, **options).logits


def cached(model: nn.Module, ids: Tensor, mask: Tensor | None, extra: int) -> Tensor | None:
    """The logits of a sequence in parts that continue a cache; None: the model has none."""
    names = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name is None:
        return None
    for cut in CUTS:
        sizes = [ids.shape[1] - sum(cut[1:]), *cut[1:]]
        try:
            return in_parts(model, ids, mask, sizes, name)
        except HOST_ERRORS as error:
            if isinstance(error, bs.SurgeryError):
                raise
    return None


HOST_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def in_parts(
    model: nn.Module, ids: Tensor, mask: Tensor | None, sizes: list[int], name: str
) -> Tensor | None:
    past = None
    outputs = []
    end = 0
    for size in sizes:
        end += size
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(input_ids=ids[:, end - size : end], use_cache=True, **{name: past}, **given)
        past = getattr(output, name, None)
        if past is None:
            return None
        outputs.append(output.logits)
    return torch.cat(outputs, 1)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest magnitude."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def assert_same(found: Tensor, wanted: Tensor, what: str) -> None:
    assert off(found, wanted) < TOLERANCE, f"{what}: off by {off(found, wanted):.2g}"
