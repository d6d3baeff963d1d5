"""The start token's key and value in its place: later tokens get the logits they had.

However the model is fed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible
from biassurgery.surgery.positions import ShiftEdit
from tests.contract.cases import CASES, LENGTH, Case, parametrize
from tests.contract.running import accepts, cache_name
from tests.models import PAD_ID
from tests.state import output_of, untouched

transplants = parametrize([case for case in CASES if case.mode == "transplant"])
SHORT = LENGTH - 1  # without the start token
PAD = 3
# Others count from the padding unless they are told or generate.
BY_THE_MASK = ("opt", "falcon_alibi", "mpt")
NO_BLOCK_MASK = ("falcon_alibi", "mpt")  # see test_sequences


@torch.no_grad()
def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, **arguments).logits


def wanted(case: Case, batch: Tensor) -> Tensor:
    """The unpatched model's logits behind the start token."""
    return logits(case.model(), batch)[:, 1:]


def assert_exact(found: Tensor, truth: Tensor) -> None:
    assert found.shape == truth.shape
    assert (found - truth).abs().max() < 1e-4


@transplants
def test_exact(case: Case) -> None:
    batch = case.batch()
    assert_exact(logits(case.patched(), batch[:, 1:]), wanted(case, batch))
    assert (
        logits(case.model(), batch[:, 1:]) - wanted(case, batch)
    ).abs().max() > 0.02  # cut off, the token is missed


@transplants
@pytest.mark.parametrize("prefill", [1, 3])
def test_exact_cached_decode(case: Case, prefill: int) -> None:
    batch = case.batch()
    model = case.patched()
    past = None
    parts = []
    name = cache_name(model)
    for chunk in batch[:, 1:].split([prefill] + [1] * (SHORT - prefill), 1):
        with torch.no_grad():
            output = model(chunk, use_cache=True, **{name: past})
        past = output[name]
        parts.append(output.logits)
    assert past.get_seq_length() == SHORT
    assert_exact(torch.cat(parts, 1), wanted(case, batch))


def padded(batch: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences without their start tokens behind padding, and their mask.

    The padding is of another length in each row.
    """
    ids = torch.full((len(batch), SHORT + PAD), PAD_ID)
    mask = torch.zeros(len(batch), SHORT + PAD, dtype=torch.long)
    for row in range(len(batch)):
        start = PAD - row
        ids[row, start : start + SHORT] = batch[row, 1:]
        mask[row, start : start + SHORT] = 1
    return ids, mask


@transplants
def test_exact_left_padding(case: Case) -> None:
    """With position ids that count real tokens, and without.

    The latter where the model reads them off the mask itself.
    """
    batch = case.batch()
    model = case.patched()
    ids, mask = padded(batch)
    positions = {}
    if accepts(model, "position_ids"):
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for arguments in (positions, {}) if case.family in BY_THE_MASK else (positions,):
        found = logits(model, ids, attention_mask=mask, **arguments)
        for row, truth in enumerate(wanted(case, batch)):
            assert_exact(found[row, PAD - row : PAD - row + SHORT], truth)


@transplants
def test_exact_generate(case: Case) -> None:
    """Left-padded generation with a cache equals that of the unpatched model with a start token."""
    batch = case.batch()
    steps = 4
    options: dict[str, Any] = {
        "max_new_tokens": steps,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ids, mask = padded(batch)
    truth = case.model().generate(batch, attention_mask=torch.ones_like(batch), **options)
    whole = case.patched().generate(
        batch[:, 1:], attention_mask=torch.ones_like(batch[:, 1:]), **options
    )
    assert torch.equal(whole.sequences, truth.sequences[:, 1:])
    assert_exact(torch.stack(whole.logits), torch.stack(truth.logits))
    behind = case.patched().generate(ids[:1], attention_mask=mask[:1], **options)
    assert torch.equal(behind.sequences[:, PAD:], truth.sequences[:1, 1:])
    assert_exact(torch.stack(behind.logits), torch.stack(truth.logits)[:, :1])


@parametrize(
    [case for case in CASES if case.mode == "transplant" and case.family not in NO_BLOCK_MASK]
)
def test_exact_packed(case: Case) -> None:
    """Two documents in a row, each without its start token and seeing only itself."""
    documents = [case.batch(), case.batch(seed=5)]
    model = case.patched()
    batch = torch.cat([document[:, 1:] for document in documents], 1)
    own = torch.block_diag(*[torch.ones(SHORT, SHORT)] * 2).tril().bool()
    arguments: dict[str, Any] = {"use_cache": False}
    arguments["attention_mask"] = torch.zeros(len(batch), 1, 2 * SHORT, 2 * SHORT).masked_fill(
        ~own, torch.finfo(torch.float32).min
    )
    if accepts(model, "position_ids"):
        arguments["position_ids"] = torch.arange(SHORT).repeat(2).expand(len(batch), -1)
    found = logits(model, batch, **arguments)
    for index, document in enumerate(documents):
        assert_exact(found[:, index * SHORT : (index + 1) * SHORT], wanted(case, document))


@transplants
def test_wrong_key_values(case: Case) -> None:
    """Key values of another model or shape, and layers by halves, are refused beforehand."""
    model = case.model()
    batch = case.batch()
    fine = case.key_values()
    foreign = replace(fine, architecture="another")
    narrow = replace(fine, keys=fine.keys[..., :-1], key_std=fine.key_std[..., :-1])
    parts = ("keys", "values", "key_std", "value_std")
    shallow = replace(fine, **{name: getattr(fine, name)[:-1] for name in parts})
    with pytest.raises(BadOption, match="differ in layers"):
        replace(fine, values=fine.values[:-1], value_std=fine.value_std[:-1])
    with untouched(model, batch):
        for wrong, says in ((foreign, "another"), (narrow, "keys"), (shallow, "keys")):
            with pytest.raises(Incompatible, match=says):
                case.patch(model, key_values=wrong)
            with pytest.raises(Incompatible, match=says):
                bs.patch_model(model, "attention_bias", init=wrong)
        with pytest.raises(BadOption, match="layers"):
            case.patch(model, layers=[0, 1])
        with pytest.raises(BadOption, match="key_values"):
            case.patch(model, key_values=None)


class Interrupted(BaseException):
    """What Ctrl-C is like."""


@parametrize(
    [case for case in CASES if case.mode == "transplant" and case.family not in NO_BLOCK_MASK]
)
def test_failure_at_the_positions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception at the shift of positions, with all attentions changed, leaves no trace."""
    model = case.model()
    batch = case.batch()

    def failing(*_: Any) -> None:
        raise Interrupted

    with untouched(model, batch), monkeypatch.context() as patching:
        patching.setattr(ShiftEdit, "attach", failing)
        with pytest.raises(Interrupted):
            case.patch(model)
    assert_exact(output_of(case.patch(model), batch[:, 1:]), wanted(case, batch))
