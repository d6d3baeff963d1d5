"""Text: a patched model says the same of a sequence however it is fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from tests.contract.cases import (
    LENGTH,
    POSITIONS,
    Case,
    decoding_cases,
    parametrize,
    text_cases,
    typical,
)
from tests.contract.oracle import assert_edited
from tests.contract.running import Seen, accepts, assert_near, cache_name, see
from tests.models import DELIMITER_ID, LAYER, PAD_ID, START_ID

PAD = 3
# Their attention masks have two dimensions, so two documents in a row see each other; the values at
# the block are checked all the same.
NO_BLOCK_MASK = ("falcon_alibi", "mpt")
# They count positions from the padding themselves, and not from 0.
OWN_POSITIONS = ("roberta", "xlm_roberta")
# Behind a norm a massive value leaves so little of a token's other channels that rounding shows.
BEHIND_NORMS = 1e-3


def assert_same(found: Seen, wanted: Seen, tolerance: float = 2e-4) -> None:
    """Same logits, and same values in the patched channel and around it.

    A small effect on the logits could hide those.
    """
    assert_near(found.logits, wanted.logits, tolerance)
    torch.testing.assert_close(found.hidden, wanted.hidden, rtol=1e-3, atol=1e-3)


def at(positions: tuple[int, ...], case: Case) -> dict[str, Any]:
    """The option that moves the positions of a positional patch."""
    return {"positions": positions} if case.positional else {}


def rows_of(seen: Seen, row: int, start: int, end: int) -> Seen:
    return Seen(seen.hidden[row : row + 1, start:end], seen.logits[row : row + 1, start:end])


@decoding_cases
@pytest.mark.parametrize("prefill", [1, 3])
def test_cached_decode(case: Case, prefill: int) -> None:
    batch = case.batch()
    model = case.patched()
    whole = see(case, model, batch)
    name = cache_name(model)
    past: Any = None
    parts: list[Seen] = []
    for chunk in batch.split([prefill] + [1] * (LENGTH - prefill), 1):
        kept: list[Any] = []
        handle = model.register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output[name])
        )
        parts.append(see(case, model, chunk, use_cache=True, **{name: past}))
        handle.remove()
        past = kept[0]
    assert past.get_seq_length() == LENGTH
    assert_same(
        Seen(torch.cat([p.hidden for p in parts], 1), torch.cat([p.logits for p in parts], 1)),
        whole,
    )


def padded(
    case: Case, model: Any, left: tuple[int, ...], right: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of rows with so much padding on either side, all of one length.

    And the other arguments of forward.
    """
    batch = case.batch()
    length = max(left) + LENGTH + max(right)
    ids = torch.full((len(batch), length), PAD_ID)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, start in enumerate(left):
        ids[row, start : start + LENGTH] = batch[row]
        mask[row, start : start + LENGTH] = 1
    arguments = {"attention_mask": mask}
    if accepts(model, "position_ids") and case.family not in OWN_POSITIONS:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, arguments


def assert_padding_is_nothing(
    case: Case, left: tuple[int, int], right: tuple[int, int], together: bool
) -> None:
    """Each padded row equals the row without padding: alone or, if need be, `together`."""
    batch = case.batch()
    start = left[0]
    model = case.patch(case.model(), **at(tuple(p + start for p in POSITIONS), case))
    ids, arguments = padded(case, model, left, right)
    found = see(case, model, ids, **arguments)
    reference = case.patched()
    for row, pad in enumerate(left):
        if together:
            wanted = rows_of(see(case, reference, batch), row, 0, LENGTH)
        else:
            wanted = see(case, reference, batch[row : row + 1])
        tolerance = 2e-4 if case.decodes else BEHIND_NORMS
        assert_same(rows_of(found, row, pad, pad + LENGTH), wanted, tolerance)


@text_cases
def test_left_padding(case: Case) -> None:
    assert_padding_is_nothing(case, (PAD, PAD), (0, 0), together=True)
    if case.row_by_row:
        assert_padding_is_nothing(case, (PAD, 0), (0, PAD), together=False)


@text_cases
def test_right_padding(case: Case) -> None:
    assert_padding_is_nothing(case, (0, 0), (PAD, PAD), together=True)


@decoding_cases
def test_generate(case: Case) -> None:
    """Left-padded generation with a cache equals a loop with neither."""
    steps = 4
    # What `shuffle` gives to a new delimiter depends on the others that are run along with it:
    # there are none in a cached step.
    suppressed = [START_ID, DELIMITER_ID] if case.mode == "shuffle" else []
    model = case.patch(case.model(), **at(tuple(p + PAD for p in POSITIONS), case))
    ids, arguments = padded(case, model, (PAD, PAD), (0, 0))
    torch.manual_seed(123)
    found = model.generate(
        ids,
        attention_mask=arguments["attention_mask"],
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=suppressed or None,
    )
    reference = case.patched()
    grown = case.batch()
    for index in range(steps):
        logits = see(case, reference, grown, use_cache=False).logits[:, -1]
        assert_near(found.logits[index], logits)
        logits[:, suppressed] = -torch.inf
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences[:, PAD:], grown)


@parametrize([case for case in typical if case.decodes and not case.on_roles])
def test_packed(case: Case) -> None:
    """Two documents in a row, positions starting over: each is edited as if it ran alone."""
    documents = [case.batch(), case.batch(seed=5)]
    batch = torch.cat(documents, 1)
    model = case.model()
    sites = None if case.on_attention else case.sites(std=200.0)
    positions = (*POSITIONS, *(p + LENGTH for p in POSITIONS))
    arguments: dict[str, Any] = {"use_cache": False}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = torch.arange(LENGTH).repeat(2).expand(len(batch), -1)
    if case.family not in NO_BLOCK_MASK:
        own = torch.block_diag(*[torch.ones(LENGTH, LENGTH)] * 2).tril().bool()
        mask = torch.zeros(len(batch), 1, 2 * LENGTH, 2 * LENGTH).masked_fill(
            ~own, torch.finfo(torch.float32).min
        )
        arguments["attention_mask"] = mask
    if not case.on_attention:
        before = see(case, case.model(), batch, **arguments)
        after = see(
            case, case.patch(case.model(), sites, **at(positions, case)), batch, **arguments
        )
        assert_edited(case, before.hidden, after.hidden, case.massive(batch), sites, positions)
    if "attention_mask" in arguments:
        packed = see(case, case.patch(case.model(), **at(positions, case)), batch, **arguments)
        for index, document in enumerate(documents):
            part = slice(index * LENGTH, (index + 1) * LENGTH)
            assert_same(
                Seen(packed.hidden[:, part], packed.logits[:, part]),
                see(case, case.patched(), document),
            )


@text_cases
def test_hidden_states(case: Case) -> None:
    """`output_hidden_states` shows the edited values, also where it was asked for before."""
    batch = case.batch()
    model = case.model()

    def shown() -> tuple[Tensor, ...]:
        torch.manual_seed(123)
        with torch.no_grad():
            return model(batch, output_hidden_states=True).hidden_states

    plain = shown()
    case.patch(model)
    wanted = see(case, case.patched(), batch).hidden
    patched = shown()
    assert torch.equal(patched[LAYER + 1], wanted)
    assert case.mode == "instrument" or not torch.equal(wanted, plain[LAYER + 1])
    bs.unpatch_model(model)
    assert all(map(torch.equal, shown(), plain))
