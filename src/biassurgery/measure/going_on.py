"""Whether ranks that run one model together can go on from their checkpoints.

Each writes its file on its own clock. After a kill one may have counted a batch more than another,
and would run the model without it: the numbers would be wrong, or both wait for each other.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path

from torch import nn

from biassurgery.adapters.sharing import needed_ranks
from biassurgery.errors import BadOption, FileError
from biassurgery.measure.ranks import ranks_of_this_call

_Answer = tuple[tuple[int, ...], int]  # who runs the model with this rank, and what it has counted


def check_ranks(model: nn.Module) -> None:
    """Raise `BadOption` if ranks that run a model with this one do not take part in the call.

    What they have counted could not be compared.
    """
    needed = needed_ranks(model)
    shared = ranks_of_this_call().shared
    outside = sorted(set(needed) - set(() if shared is None else shared.ranks))
    if outside:
        raise BadOption(
            f"checkpoint: ranks {list(needed)} run the model together, but group= leaves {outside}"
            " out, so that it cannot be told whether all have counted the same batches; leave"
            " group= out, or checkpoint=."
        )


def check_counts(path: Path, model: nn.Module, counted: int) -> None:
    """Raise `FileError` on all ranks if some that run a model together differ in what they counted.

    Args:
        path: of this rank's file.
        model: which they run.
        counted: how many batches the file holds.
    """
    needed = needed_ranks(model)
    if needed:
        ranks_of_this_call().check((needed, counted), partial(_check_equal, path.stem))


def _check_equal(name: str, answers: dict[int, _Answer]) -> None:
    for rank, other in combinations(answers, 2):
        (needed, counted), (_, others) = answers[rank], answers[other]
        if other in needed and counted != others:
            raise FileError(
                f"checkpoint: rank {rank} has counted {counted} batches and rank {other} {others},"
                " but they run one model together, and cannot go on from different batches; delete"
                f" the files {name}.rank* of all ranks to start anew."
            )
