"""Measurements under `torch.distributed`: sums over two processes, and their failures."""

from __future__ import annotations

import math
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import biassurgery as bs
from biassurgery import evaluate
from biassurgery.errors import BadBatch, BadOption, RankFailed, UnsupportedModel
from biassurgery.extend import Statistic
from biassurgery.measure import checkpoint
from biassurgery.measure.ranks import taking_part
from tests import models, vision
from tests.evaluate.loops import loop
from tests.measure.ranks_together import (
    PATIENCE,
    be_impatient,
    fails,
    killed,
    refused,
    run_ranks,
    same,
    slow,
    then,
)
from tests.tiny_vision import pictures, tiny

TEXTS = [models.tokens(rows, 24, seed=rows) for rows in (4, 3, 2, 5, 1)]
BARRIER = 1  # keys that torch's own barrier may leave in the store
IMAGES = [models.images(rows, seed=rows) for rows in (3, 1, 4)]


class Norms(Statistic):
    """The sum of the norms of all tokens at each block."""

    name = "norms_of_ranks"

    def see(self, output: Any) -> None:
        self.totals.add(output.layer, output.hidden.double().norm(dim=-1)[output.real].sum())

    def result(self) -> dict[int, float]:
        return {layer: float(total) for layer, total in self.totals.items()}


class NoSum(Norms):
    name = "no_sum"

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.totals = {"norm": 0.0}

    def see(self, output: Any) -> None:
        self.totals["norm"] += float(output.hidden.norm())


class Elsewhere(Norms):
    name = "elsewhere"

    def see(self, output: Any) -> None:
        self.norm = float(output.hidden.norm())


def measurements(part: slice, **options: Any) -> dict[str, Any]:
    """What every verb says of a part of the data."""
    texts = TEXTS[part]
    images = IMAGES[part]
    llama = models.planted("llama")
    sites = bs.calibrate(models.planted("llama"), TEXTS[0], group=False)
    vit = vision.planted("hub_dinov2")
    classifier = tiny("timm")
    x = pictures()
    labels = torch.arange(len(x)) % 7
    pairs = list(zip(x.split(5), labels.split(5)))
    head = evaluate.LinearHead(torch.randn(7, 2 * 32, generator=seeded()), torch.zeros(7))
    clip = tiny("clip")
    detection = bs.detect(llama, texts, statistics=("norms_of_ranks",), **options)
    return {
        "calibrate": list(bs.calibrate(llama, texts, **options)),
        "detect": {**vars(detection), "sites": list(detection.sites)},
        "detect images": vars(bs.detect(vit, images, **options)) | {"sites": None},
        "key values": bs.calibrate_key_values(llama, texts, **options),
        "registers": bs.calibrate_registers(vit, images, **options),
        "register neurons": bs.find_register_neurons(
            models.planted_vit(), images, count=4, **options
        ),
        "by role": bs.attention_by_role(vit, images, **options),
        "perplexity": bs.perplexity(llama, texts, **options),
        "compare": bs.compare(llama, lambda m: bs.perplexity(m, texts), sites=sites, **options)
        .to_pandas()
        .to_dict(),
        "top1": bs.top1_accuracy(classifier, pairs[part], **options),
        "knn": evaluate.knn_accuracy(classifier, pairs[:3], pairs[part], k=3, **options),
        "linear": evaluate.linear_accuracy(tiny("dinov2"), pairs[part], head, **options),
        "fitted": evaluate.fit_linear_head(
            tiny("dinov2"), pairs[:2], iterations=20, penalty=1.0, **options
        ).weight,
        "zero-shot": evaluate.zero_shot_accuracy(
            clip, pairs[part], torch.randn(24, 7, generator=seeded()), **options
        ),
    }


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def sums(rank: int) -> None:
    together = measurements(slice(rank, None, 2))
    alone = measurements(slice(None), group=False)
    for verb in alone:
        same(together[verb], alone[verb], verb)
    rows = [row.tolist() for batch in TEXTS for row in batch]
    wanted = loop(models.planted("llama"), rows)
    assert together["perplexity"] == pytest.approx(wanted, rel=1e-5)
    own = bs.perplexity(models.planted("llama"), TEXTS[rank::2], group=False)
    assert abs(own - wanted) > 1e-3 * wanted  # it is not that any part would do
    assert together["detect"]["sequences"] == 15
    assert 0 < together["top1"] < 1
    assert 0 < together["knn"] < 1
    resumed(rank)
    interrupted(rank)


def resumed(rank: int) -> None:
    """What is resumed from counts once."""
    model = models.planted("llama")
    before = bs.calibrate(model, models.tokens(seed=9), group=False)
    found = bs.calibrate(model, TEXTS[rank::2], resume=before)
    wanted = before + bs.calibrate(model, TEXTS, group=False)
    for site, other in zip(found, wanted, strict=True):
        assert replace(site, mean=0, std=0) == replace(other, mean=0, std=0)
        assert site.mean == pytest.approx(other.mean, rel=1e-12)


def interrupted(rank: int) -> None:
    """Each rank goes on from a file of its own, one of them from further ahead."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    file = Path(folder[0], "pass")
    checkpoint._SECONDS = 0.0
    checkpoint._SHARE = math.inf
    model = models.planted("llama")
    mine = TEXTS[rank::2]
    whole = bs.calibrate(model, mine)
    loader = then(OSError("the disk"), *mine[:2]) if rank == 0 else mine
    with pytest.raises((OSError, RankFailed)):
        bs.calibrate(model, loader, checkpoint=file)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    assert bs.calibrate(model, mine, checkpoint=file) == whole
    assert len(seen) == (2 if rank == 0 else 1)  # the third batch; the run that confirms the sites
    assert Path(f"{file}.rank{rank}").exists()
    assert not file.exists()


def failures(rank: int) -> None:
    model = models.planted("llama")
    mine = TEXTS[rank::2]
    ratio = -1.0 if rank == 1 else 1000.0
    fails(rank, 1, BadOption, "min_ratio", lambda: bs.calibrate(model, mine, min_ratio=ratio))
    for failing, error in ((1, OSError("the disk")), (0, KeyboardInterrupt("^C"))):
        loader = then(error, *mine) if rank == failing else mine
        for verb in (bs.perplexity, bs.detect, bs.calibrate_key_values):
            again = then(error, *mine) if rank == failing else loader
            fails(rank, failing, type(error), str(error), lambda v=verb, d=again: v(model, d))
    nothing = mine if rank == 0 else []
    fails(rank, 1, BadBatch, "batches: there are none", lambda: bs.calibrate(model, nothing))
    stranger = model if rank == 0 else torch.nn.Linear(2, 2)
    fails(rank, 1, UnsupportedModel, "model", lambda: bs.calibrate(stranger, mine))
    fails(rank, 1, UnsupportedModel, "model", lambda: bs.detect(None if rank else model, mine))

    def evaluated(m: Any) -> float:
        if rank == 1:
            raise ZeroDivisionError("in evaluate")
        return bs.perplexity(m, mine)

    fails(
        rank,
        1,
        ZeroDivisionError,
        "in evaluate",
        lambda: bs.compare(model, evaluated, [None]),
    )


def refusals(rank: int) -> None:
    model = models.planted("llama")
    mine = TEXTS[rank::2]
    for verb in (bs.calibrate, bs.perplexity):
        refused(
            BadBatch,
            ("ranks 0 and 1 read the same data", "DistributedSampler", "islice", "group=False"),
            lambda v=verb: v(model, TEXTS),
        )
    alone = bs.perplexity(model, TEXTS, group=False)
    assert alone == pytest.approx(loop(model, [r.tolist() for b in TEXTS for r in b]), rel=1e-5)
    refused(
        BadOption,
        ("'no_sum'", "two ranks does not add up", "Sums", "group=False"),
        lambda: bs.detect(model, mine, statistics="no_sum"),
    )
    assert "no_sum" in bs.detect(model, mine, statistics="no_sum", group=False).statistics
    refused(
        BadOption,
        ("'elsewhere'", "nothing in its `totals`"),
        lambda: bs.detect(model, mine, statistics="elsewhere"),
    )
    refused(
        BadOption,
        ("evaluate", "on rank 0", "on rank 1", "group=False"),
        lambda: bs.compare(model, lambda _: float(rank), [None]),
    )
    assert bs.compare(model, lambda _: float(rank), [None], group=False)[None] == rank
    x = pictures()
    pairs = list(zip(x.split(5), (torch.arange(len(x)) % 7).split(5)))
    refused(
        BadBatch,
        ("train: ranks 0 and 1 read different data",),
        lambda: evaluate.knn_accuracy(tiny("timm"), pairs[rank::2], pairs[rank::2], k=1),
    )
    refused(BadOption, ("group: 'all'",), lambda: bs.calibrate(model, mine, group="all"))
    for verb in (bs.calibrate, bs.detect):
        refused(
            BadOption,
            ("min_ratio: 50.0 on rank 0 and 51.0 on rank 1",),
            lambda v=verb: v(model, mine, min_ratio=50.0 + rank),
        )
    refused(
        BadOption,
        ("length: 6 on rank 0 and 7 on rank 1",),
        lambda: bs.perplexity(model, models.tokens(1, 40 + rank).flatten(), length=6 + rank),
    )
    if rank:
        bs.patch_model(model, "instrument")
    refused(BadOption, ("patches: ", "instrument"), lambda: bs.perplexity(model, mine))
    bs.unpatch_model(model)


def mistaken(rank: int) -> None:
    """Ranks that do not make the same calls hear of it instead of waiting."""
    model = models.planted("llama")
    mine = TEXTS[rank::2]
    verb = bs.calibrate if rank else bs.perplexity
    refused(
        BadOption,
        ("rank 1 is in calibrate while rank 0 is in perplexity",),
        lambda: verb(model, mine),
    )
    for skipping in (0, 1):
        with pytest.raises(RankFailed, match=f"rank {skipping}.*perplexity"):
            bs.compare(
                model,
                lambda m, s=skipping: 1.0 if rank == s else bs.perplexity(m, mine),
                [None],
            )


def alone_on_rank_0(rank: int) -> None:
    """As a callback of a Trainer does."""
    model = torch.nn.parallel.DistributedDataParallel(models.planted("llama"))
    model(TEXTS[rank], labels=TEXTS[rank]).loss.backward()
    started = time.monotonic()
    if rank == 0:
        assert math.isfinite(bs.perplexity(model, TEXTS, group=False))
        found = bs.compare(
            model,
            lambda m: bs.perplexity(m, TEXTS),
            [None, "set_zero"],
            group=False,
            sites=bs.calibrate(model, TEXTS, group=False),
        )
        assert found["set_zero"] != found[None]
        assert bs.detect(model, TEXTS, group=False).sequences == 15
    assert time.monotonic() - started < 10
    dist.barrier()
    # With other numbers of batches, DistributedDataParallel itself would wait.
    bs.perplexity(model, TEXTS[:3] if rank == 0 else TEXTS[3:4])
    subgroup = dist.new_group([1])
    if rank == 1:
        assert bs.detect(model, TEXTS, group=subgroup).sequences == 15
    else:
        with pytest.raises(BadOption, match="this rank is in"):
            bs.detect(model, TEXTS, group=subgroup)


def never_called(rank: int) -> None:
    """After the time-out of the process group, with the reason."""
    model = models.planted("llama")
    if rank == 0:
        store = dist.distributed_c10d._get_default_store()
        before = store.timeout
        store.set_timeout(type(before)(seconds=1))
        with pytest.raises(RankFailed, match=r"rank 1 has not called calibrate in the 1 s"):
            bs.calibrate(model, TEXTS)
        store.set_timeout(before)
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(RankFailed, match="rank 0 failed in calibrate"):
            bs.calibrate(model, TEXTS)


def sharded(rank: int) -> None:
    """FSDP2: one model in parts, of which each rank reads data of its own."""
    model = fully_shard(models.planted("llama"))
    plain = models.planted("llama")
    mine = TEXTS[rank:4:2]
    assert bs.detect(model, mine).sequences == 14
    wanted = bs.perplexity(plain, TEXTS[:4], group=False)
    assert bs.perplexity(model, mine) == pytest.approx(wanted, rel=1e-6)
    refused(BadBatch, ("read the same data",), lambda: bs.calibrate(model, TEXTS))
    nothing = mine if rank == 0 else []
    fails(rank, 1, BadBatch, "batches: there are none", lambda: bs.perplexity(model, nothing))


def halved(model: Any, mesh: DeviceMesh) -> Any:
    """The model, each MLP in parts on the ranks of a mesh."""
    for block in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        parallelize_module(block.mlp, mesh, plan | {"down_proj": RowwiseParallel()})
    return model


def diagnosed(rank: int) -> None:
    """Diagnoses are not added up: refused, or of one rank, evaluations inside included."""
    model = models.planted("llama")
    refused(UnsupportedModel, ("0, 1", "group=False"), lambda: bs.diagnose(model, TEXTS))
    split = halved(models.planted("llama"), init_device_mesh("cpu", (2,)))
    for group in (None, False):
        refused(
            UnsupportedModel,
            ("tensor-parallel",),
            lambda group=group: bs.diagnose(split, TEXTS, group=group),
        )
    if rank == 0:
        found = bs.diagnose(model, TEXTS, measure=True, group=False)
        assert found.tokens == sum(batch.numel() for batch in TEXTS)
        wanted = bs.perplexity(model, TEXTS, group=False)
        assert found.measured[0].perplexity == pytest.approx(wanted, rel=1e-2)  # nobody is awaited


def tensor_parallel(rank: int) -> None:
    """Two ranks run one model together: they read the same data, which count once."""
    model = halved(models.planted("llama"), init_device_mesh("cpu", (2,)))
    found = bs.detect(model, TEXTS)
    wanted = bs.detect(models.planted("llama"), TEXTS, group=False)
    assert (found.sequences, found.tokens) == (15, wanted.tokens)
    assert [site.count for site in found.sites] == [site.count for site in wanted.sites]
    refused(
        BadBatch,
        ("ranks 0 and 1 run one model together", "theirs differ", "group="),
        lambda: bs.detect(model, TEXTS[rank::2]),
    )


def scenes(rank: int) -> None:
    for scene in (
        sums,
        failures,
        refusals,
        mistaken,
        alone_on_rank_0,
        never_called,
        sharded,
        tensor_parallel,
        diagnosed,
    ):
        scene(rank)
    # After all that they are still in step.
    found = bs.perplexity(models.planted("llama"), TEXTS[rank::2])
    wanted = bs.perplexity(models.planted("llama"), TEXTS, group=False)
    assert found == pytest.approx(wanted, rel=1e-6)
    at_last(rank)


def at_last(rank: int) -> None:
    """A rank may be slow for longer than it may be silent; one that is killed is silent."""
    be_impatient()
    model = models.planted("llama")
    late = slow(3.0, TEXTS[1], TEXTS[3]) if rank else TEXTS[0::2]
    wanted = bs.perplexity(model, TEXTS, group=False)
    assert bs.perplexity(model, late) == pytest.approx(wanted, rel=1e-6)
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 has given no sign of life for 10 s"):
        bs.detect(model, killed(TEXTS[1], TEXTS[3]) if rank else TEXTS[0::2])
    assert time.monotonic() - started < PATIENCE / 3


def test_two_ranks(tmp_path: Path) -> None:
    assert run_ranks(scenes, tmp_path) == [0, -signal.SIGKILL]


def meshes(rank: int) -> None:
    """Two replicas of a model, each of which two ranks run together."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = TEXTS[rank // 2 : 4 : 2]
    wanted = bs.detect(models.planted("llama"), TEXTS[:4], group=False)
    own = bs.detect(models.planted("llama"), mine, group=False)
    for data_parallel in (False, True):
        model = halved(models.planted("llama"), mesh["tp"])
        if data_parallel:
            model = fully_shard(model, mesh=mesh["dp"])
        found = bs.detect(model, mine)
        assert (found.sequences, found.tokens) == (wanted.sequences, wanted.tokens)
        assert found.sequences == 14 > own.sequences
        same(found.layers, wanted.layers)
        refused(BadBatch, ("read the same data",), lambda m=model: bs.detect(m, TEXTS[:2]))
        assert bs.detect(model, mine, group=mesh["tp"].get_group()).sequences == own.sequences
    hybrid = fully_shard(
        models.planted("llama"),
        mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")),
    )
    assert bs.perplexity(hybrid, TEXTS[rank : rank + 1]) == pytest.approx(
        bs.perplexity(models.planted("llama"), TEXTS[:4], group=False), rel=1e-6
    )


@pytest.mark.long
def test_four_ranks_on_meshes(tmp_path: Path) -> None:
    assert run_ranks(meshes, tmp_path, 4) == [0] * 4


def without_the_store(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    before = store.num_keys()
    with taking_part("large", None) as ranks:  # more than the store takes at once
        total = ranks.total(torch.arange(3_000_000, dtype=torch.float64))
    assert total.equal(2 * torch.arange(3_000_000, dtype=torch.float64))
    dist.barrier()
    calls_and_signs = 2 * 2
    assert store.num_keys() - before <= calls_and_signs + BARRIER
    model = models.planted("llama")
    with pytest.raises(RankFailed, match="the store of the process group does not answer"):
        bs.detect(model, TEXTS[1::2] if rank else killed(TEXTS[0]))


@pytest.mark.long
def test_the_rank_that_holds_the_store_is_killed(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(without_the_store, tmp_path, port=port) == [-signal.SIGKILL, 0]
