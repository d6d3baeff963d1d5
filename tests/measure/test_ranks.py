"""`calibrate` under `torch.distributed`: two processes, each with its own batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch
from biassurgery.measure import checkpoint
from tests import models


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    model = models.planted("llama")
    batches = [models.tokens(seed=seed) for seed in range(5)]
    bs.calibrate(
        model, batches[rank::2], resume=bs.Sites.load(f"{folder}/before.safetensors")
    ).save(f"{folder}/{rank}.safetensors")
    try:
        bs.calibrate(model, batches if rank == 0 else [])
    except BadBatch as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    # One rank is ahead when both are interrupted; each goes on from a file of its own.
    checkpoint._SECONDS = 0.0
    checkpoint._SHARE = math.inf
    file = f"{folder}/pass"
    mine = batches[rank::2]
    bad = torch.zeros(0, 5, dtype=torch.int64)
    try:
        bs.calibrate(model, [*mine[: 1 + rank], bad], checkpoint=file)
    except BadBatch:
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
        bs.calibrate(model, mine, checkpoint=file).save(f"{folder}/whole{rank}.safetensors")
        assert len(seen) == len(mine) - 1 - rank
    torch.distributed.destroy_process_group()


def test_all_ranks_get_the_sum_and_each_others_errors(tmp_path):
    model = models.planted("llama")
    before = bs.calibrate(model, models.tokens(seed=9))
    before.save(tmp_path / "before.safetensors")
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    first, second = (bs.Sites.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first == second
    wanted = before + bs.calibrate(model, [models.tokens(seed=seed) for seed in range(5)])
    assert len(first) == len(wanted)
    for site, same in zip(first, wanted, strict=True):
        assert replace(site, mean=0, std=0) == replace(same, mean=0, std=0)
        assert site.mean == pytest.approx(same.mean, rel=1e-12)
        assert site.std == pytest.approx(same.std, rel=1e-9, abs=1e-9)
    for rank in range(2):
        again = bs.Sites.load(tmp_path / f"whole{rank}.safetensors")
        both = [
            bs.calibrate(model, [models.tokens(seed=s) for s in range(r, 5, 2)]) for r in (0, 1)
        ]
        assert again == both[0] + both[1]
        assert (tmp_path / f"pass.rank{rank}").exists()
    for rank in range(2):
        assert "there are none" in (tmp_path / f"{rank}.txt").read_text()
