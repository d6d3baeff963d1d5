"""`shuffle`: the values of other sequences of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biassurgery.edits.massive import (
    ShuffleEdit,
)
from biassurgery.errors import BatchTooSmall
from tests.edits.hidden_states import DTYPES, SITES, WIDTH, hidden_state, level_of, massive


def donors(hidden: Tensor, row: int, token: int, channel: int) -> list[tuple[int, float]]:
    """(sequence, value) that a loop would allow: other sequences with this level; at the same token
    if massive there, else the first.
    """
    level = level_of(hidden[row, token, channel].item(), channel)
    result = []
    for other in range(hidden.shape[0]):
        tokens = [
            t
            for t in range(hidden.shape[1])
            if level_of(hidden[other, t, channel].item(), channel) == level
        ]
        if other != row and tokens:
            result.append(
                (other, hidden[other, token if token in tokens else tokens[0], channel].item())
            )
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_shuffle_takes_the_values_of_another_sequence(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = hidden_state(dtype, rows)
    for row in range(rows):  # every value is its own, and delimiters stand at different tokens
        hidden[row, 0, 2] = 3000 + 64 * row
        hidden[row, 3, 2] = 0
        hidden[row, int(torch.randint(1, 5, (1,), generator=generator)), 2] = 8000 + 128 * row
        hidden[row, 5, 2] = -2400 - 64 * row
        hidden[row, 0, 5] = -700 - 16 * row
    where = massive(hidden)
    edit = ShuffleEdit(SITES)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        shuffled = edit(hidden)
        assert torch.equal(shuffled[~where], hidden[~where])
        for row, token, channel in where.nonzero().tolist():
            allowed = dict(donors(hidden, row, token, channel))
            taken = [
                other
                for other, value in allowed.items()
                if value == shuffled[row, token, channel].item()
            ]
            assert len(taken) == 1, (row, token, channel)
            seen.add((row, taken[0]))
    assert seen == {(a, b) for a in range(rows) for b in range(rows) if a != b}


def test_shuffle_passes_over_sequences_that_have_nothing_to_give():
    """Of four sequences the second and the last have a delimiter: they must exchange it whatever
    the draw.
    """
    hidden = torch.zeros(4, 6, WIDTH)
    hidden[:, 0, 2] = torch.tensor([3000.0, 3001.0, 3002.0, 3003.0])
    hidden[1, 2, 2] = 9001.0
    hidden[3, 4, 2] = 9003.0
    for seed in range(20):
        torch.manual_seed(seed)
        shuffled = ShuffleEdit(SITES)(hidden)
        assert shuffled[1, 2, 2] == 9003.0
        assert shuffled[3, 4, 2] == 9001.0
        assert all(shuffled[row, 0, 2] != hidden[row, 0, 2] for row in range(4))


def test_shuffle_leaves_a_value_that_no_other_sequence_has():
    hidden = torch.zeros(3, 4, WIDTH)
    hidden[:, 0, 2] = torch.tensor([3000.0, 3001.0, 3002.0])
    hidden[1, 2, 5] = -700.0
    shuffled = ShuffleEdit(SITES)(hidden)
    assert shuffled[1, 2, 5] == -700.0
    assert not torch.equal(shuffled[:, 0, 2], hidden[:, 0, 2])


def test_shuffle_takes_both_channels_of_a_token_from_one_sequence():
    hidden = torch.zeros(5, 2, WIDTH)
    hidden[:, 0, 2] = 3000.0 + torch.arange(5)
    hidden[:, 0, 5] = -700.0 - torch.arange(5)
    for seed in range(10):
        torch.manual_seed(seed)
        shuffled = ShuffleEdit(SITES)(hidden)
        assert torch.equal(shuffled[:, 0, 2] - 3000, -700 - shuffled[:, 0, 5])


def test_shuffle_needs_two_sequences():
    with pytest.raises(BatchTooSmall, match="two"):
        ShuffleEdit(SITES)(hidden_state(rows=1))
