"""What `pin` writes: calibrated values at tokens of their role, whatever stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadBatch
from tests.contract.cases import CASES, LENGTH, Case, parametrize
from tests.contract.running import accepts, assert_near, cache_name, see, substitute
from tests.models import CHANNEL, LAYER, PAD_ID

PINNED = [case for case in CASES if case.on_roles]
every_family = pytest.mark.parametrize("case", list(map(pytest.param, PINNED)), ids=str)
every_text = pytest.mark.parametrize(
    "case", [pytest.param(case) for case in PINNED if case.modality == "text"], ids=str
)
# They take no positions, so that packed documents cannot be told.
NO_POSITIONS = ("falcon_alibi", "mpt")


def levels(case: Case) -> dict[str, float]:
    """What is written at block `LAYER`, by role."""
    return {site.role: site.mean for site in case.role_sites() if site.layer == LAYER}


def tokens_of(case: Case, hidden: Tensor) -> Tensor:
    """(T,) what belongs in the channel of each token of a sequence; NaN: what the block says."""
    wanted = torch.full((hidden.shape[1],), torch.nan)
    if case.modality == "text":
        wanted[0] = levels(case)["start"]
    else:
        for position, role in enumerate(case.placed()):
            wanted[position] = levels(case).get(role, torch.nan)
    return wanted


@parametrize(PINNED)
def test_identity(case: Case) -> None:
    """Written where it stands already, it changes nothing."""
    batch = case.batch(1)
    plain = see(case, case.model(), batch)
    role = "start" if case.modality == "text" else case.placed()[-1]
    position = 0 if case.modality == "text" else len(case.placed()) - 1
    value = plain.hidden[0, position, CHANNEL].item()
    model = case.model()
    bs.patch_model(model, "pin", sites=[bs.Site(LAYER, CHANNEL, role, mean=value or 1e-30)])
    assert_near(see(case, model, batch).logits, plain.logits, 1e-6)


@every_family
def test_effect(case: Case) -> None:
    """Each role's value stands at its tokens, all else is the block's own, bit for bit."""
    batch = case.batch()
    before = see(case, case.model(), batch)
    after = see(case, case.patched(), batch)
    wanted = tokens_of(case, before.hidden)
    written = ~wanted.isnan()
    assert written.any()
    assert not written.all()
    assert torch.equal(after.hidden[:, written, CHANNEL], wanted[written].expand(len(batch), -1))
    left = torch.ones_like(before.hidden, dtype=torch.bool)
    left[:, written, CHANNEL] = False
    assert torch.equal(after.hidden[left], before.hidden[left])
    assert not torch.equal(after.logits, before.logits)
    replaced = case.model()
    substitute(case, replaced, lambda _: after.hidden)
    assert torch.equal(after.logits, see(case, replaced, batch).logits)


@every_text
def test_whatever_stands_there(case: Case) -> None:
    """A first token that is no start token gets the value as well."""
    batch = case.batch()
    batch[:, 0] = 50
    model = case.patched()
    assert (see(case, model, batch).hidden[:, 0, CHANNEL] == levels(case)["start"]).all()


@every_text
def test_padding_and_chunks(case: Case) -> None:
    """Rows behind padding, right-padded, read in chunks, and token by token, are as they alone."""
    batch = case.batch()
    model = case.patched()
    alone = [see(case, case.patched(), row[None]).logits for row in batch]
    ids = torch.full((2, LENGTH + 3), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, start in ((0, 3), (1, 0)):
        ids[row, start : start + LENGTH] = batch[row]
        mask[row, start : start + LENGTH] = 1
    arguments: dict[str, Any] = {"attention_mask": mask}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = see(case, model, ids, **arguments).logits
    assert_near(found[:1, 3:], alone[0])
    assert_near(found[1:, :LENGTH], alone[1])
    # The first chunk of row 0 is padding and nothing else.
    name, past, parts = cache_name(model), None, []
    for start, end in ((0, 3), (3, 5), (5, LENGTH + 3)):
        chunk = {key: value[:, start:end] for key, value in arguments.items()}
        chunk["attention_mask"] = mask[:, :end]
        kept: list[Any] = []
        hook = model.register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output[name])
        )
        parts.append(see(case, model, ids[:, start:end], use_cache=True, **{name: past}, **chunk))
        hook.remove()
        past = kept[0]
    values = torch.cat([part.hidden for part in parts], 1)[..., CHANNEL]
    assert values[0, 3] == values[1, 0] == levels(case)["start"]
    assert_near(torch.cat([part.logits for part in parts], 1)[:1, 3:], alone[0])


@every_text
def test_packed(case: Case) -> None:
    """Positions that start over begin a document."""
    if case.family in NO_POSITIONS:
        model = case.patched()
        mask = torch.zeros(2, 1, LENGTH, LENGTH)
        with pytest.raises(BadBatch, match="attention_mask"):
            model(case.batch(), attention_mask=mask)
        return
    batch = torch.cat([case.batch(), case.batch(seed=5)], 1)
    positions = torch.arange(LENGTH).repeat(2).expand(len(batch), -1)
    found = see(case, case.patched(), batch, position_ids=positions, use_cache=False).hidden
    value = levels(case)["start"]
    assert (found[:, [0, LENGTH], CHANNEL] == value).all()
    assert not (found[:, 1:LENGTH, CHANNEL] == value).any()


@parametrize(PINNED)
def test_dtypes(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        batch = case.batch() if case.modality == "text" else case.batch().to(dtype)
        hidden = see(case, case.patched(dtype), batch).hidden
        wanted = tokens_of(case, hidden).to(dtype)
        written = ~wanted.isnan()
        assert hidden.dtype == dtype
        assert torch.equal(hidden[:, written, CHANNEL], wanted[written].expand(len(batch), -1))
