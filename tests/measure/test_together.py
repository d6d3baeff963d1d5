"""One model that two processes run together: what fails on one of them, the other hears at once.

Without that it would wait in a collective for as long as the process group's time-out.
"""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import biassurgery as bs
from biassurgery import evaluate
from biassurgery.errors import BadBatch, BadOption, FileError, RankFailed, UnsupportedModel
from biassurgery.findings import files
from biassurgery.measure import checkpoint
from biassurgery.measure.ordinary import ordinary_tokens
from biassurgery.surgery.edit import Edit
from tests import models
from tests.measure.ranks_together import be_impatient, fails, raised, refused, run_ranks, same, then
from tests.measure.test_ranks import halved
from tests.tiny_vision import pictures, tiny

TEXTS = [models.tokens(rows, 24, seed=rows) for rows in (4, 3, 2, 5)]
NOT_SHARED = "another folder"


def tensor_parallel() -> Any:
    """Both ranks read the same data."""
    return halved(models.planted("llama"), init_device_mesh("cpu", (2,)))


def sharded(patch: Callable[[Any], Any] = lambda model: model) -> Any:
    """FSDP2: each rank reads data of its own."""
    model = patch(models.planted("llama"))
    return in_parts(model, model.model.layers)


def in_parts(model: Any, blocks: Iterable[Any]) -> Any:
    """Each block is gathered in every forward, which all ranks then have to make."""
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


def with_bias(model: Any) -> Any:
    torch.manual_seed(0)
    return bs.patch_model(model, "attention_bias", kind="kv", init="normal", std=1.0)


def full(*_: Any) -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def batches(rank: int) -> None:
    """The loader of one rank fails, or ends, where the other has a batch."""
    for model, mine, verbs in (
        (tensor_parallel(), TEXTS, (bs.calibrate, bs.perplexity, bs.calibrate_key_values)),
        (sharded(), TEXTS[rank::2] * 2, (bs.perplexity, bs.detect)),
    ):
        for failing, count, error in (
            (1, 1, OSError("the disk")),
            (0, 3, OSError("the disk")),
            (1, 2, KeyboardInterrupt("^C")),
        ):
            for verb in verbs if count == 1 else verbs[:2]:
                data = then(error, *mine[:count]) if rank == failing else mine
                fails(
                    rank,
                    failing,
                    type(error),
                    str(error),
                    lambda v=verb, m=model, d=data: v(m, d, progress=False),
                )
        fewer = mine[:3] if rank == 1 else mine
        for verb in (bs.detect, bs.perplexity):
            refused(
                BadBatch,
                ("[1] have none left", "as many batches"),
                lambda v=verb, m=model, d=fewer: v(m, d),
            )
        assert not any(isinstance(m, Edit) for m in model.modules())


def going_on(rank: int, folder: Path) -> None:
    """A pass that one rank broke off goes on from the checkpoints of both."""
    model = tensor_parallel()
    file = folder / "pass"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_SECONDS", 0.0)
        patch.setattr(checkpoint, "_SHARE", math.inf)
        data = then(OSError("the disk"), *TEXTS[:3]) if rank else TEXTS
        fails(rank, 1, OSError, "the disk", lambda: bs.perplexity(model, data, checkpoint=file))
        seen: list[int] = []
        handle = model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
        found = bs.perplexity(model, TEXTS, checkpoint=file)
        handle.remove()
    assert len(seen) == 1
    assert found == bs.perplexity(model, TEXTS)


def images(rank: int) -> None:
    model = tiny("timm")
    in_parts(model, model.blocks)
    x = pictures()
    pairs = [(x, torch.arange(len(x)) % 7) for _ in range(4)]
    mine = [(image + rank, labels) for image, labels in pairs]
    data = then(OSError("the disk"), *mine[:3]) if rank else mine
    fails(rank, 1, OSError, "the disk", lambda: bs.top1_accuracy(model, data))
    refused(
        UnsupportedModel,
        ("forward_features", "register_fsdp_forward_method"),
        lambda: evaluate.knn_accuracy(model, pairs, mine, k=1),
    )
    for name in ("forward_features", "forward_head"):
        register_fsdp_forward_method(model, name)
    found = evaluate.knn_accuracy(model, pairs, mine, k=1)
    both = [(image + other, labels) for other in (0, 1) for image, labels in pairs]
    assert found == evaluate.knn_accuracy(tiny("timm"), pairs, both, k=1, group=False)
    data = then(OSError("the disk"), *pairs[:3]) if rank == 0 else pairs
    fails(
        rank,
        0,
        OSError,
        "the disk",
        lambda: evaluate.knn_accuracy(model, data, mine, k=1),
    )


def patching(rank: int) -> None:
    """A patch is on both ranks or on none, whichever of them refuses it, and is one patch."""
    model = tensor_parallel()
    ids = TEXTS[0]
    before = model(ids).logits
    for failing in (0, 1):
        kind = "no kind" if rank == failing else "kv"
        fails(
            rank,
            failing,
            BadOption,
            "kind",
            lambda k=kind: bs.patch_model(model, "attention_bias", kind=k),
        )
        assert not bs.patches(model)
    refused(
        BadOption,
        ("patches:", "'k'", "'v'", "on rank 1"),
        lambda: bs.patch_model(model, "attention_bias", kind="kv"[rank]),
    )
    assert not bs.patches(model)
    assert model(ids).logits.equal(before)
    fails(
        rank, 1, BadOption, "min_share", lambda: ordinary_tokens(model, ids, min_share=0.3 - rank)
    )
    with_bias(model)
    assert not model(ids).logits.allclose(before, atol=1e-3)
    bs.unpatch_model(model)
    assert model(ids).logits.equal(before)


def saving(rank: int, folder: Path) -> None:
    """The file is whole or the older one, whoever fails."""
    for build in (lambda: with_bias(tensor_parallel()), lambda: sharded(with_bias)):
        model = build()
        place = folder / "saved"
        bs.save_patch(model, place)
        written = dict(contents(place))
        wanted = models.planted("llama")
        bs.load_patch(wanted, place)
        ids = TEXTS[1]
        assert wanted(ids).logits.allclose(
            with_bias(models.planted("llama"))(ids).logits, atol=1e-5
        )
        # rank 1 has a name that no folder can have
        name = place if rank == 0 else "x" * 5000
        fails(rank, 1, FileError, "folder", lambda n=name, m=model: bs.save_patch(m, n))
        # the disk of the rank that writes is full
        for step in ("_sync", "save_tensors"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, step, full)
                patch.setattr("biassurgery.saving.folder.save_tensors", files.save_tensors)
                fails(
                    rank,
                    0,
                    FileError,
                    "folder: cannot write",
                    lambda m=model, p=place: bs.save_patch(m, p),
                )
        refused(
            BadOption,
            ("folder:", "on rank 0", "on rank 1"),
            lambda m=model: bs.save_patch(m, folder / f"of_{rank}"),
        )
        # one rank is interrupted before it has told what it would write
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("biassurgery.saving.save.version", interrupted)
            fails(
                rank, 1, KeyboardInterrupt, "^C", lambda m=model: bs.save_patch(m, folder / "new")
            )
        assert dict(contents(place)) == written
        assert sorted(path.name for path in folder.glob("*/*.part")) == []
        assert not any((folder / name).exists() for name in ("new", "of_0", "of_1"))
        dist.barrier()  # else the first rank saves again while the other looks


def interrupted(_: str) -> str:
    raise KeyboardInterrupt("^C")


def contents(place: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in place.iterdir())


def loading(rank: int, folder: Path) -> None:
    """All patches are on, on both ranks, or none is."""
    sites = bs.calibrate(models.planted("llama"), TEXTS, group=False)
    if rank == 0:
        both = bs.patch_model(with_bias(models.planted("llama")), "set_zero", sites=sites)
        bs.save_patch(both, folder / "two")
        bs.save_patch(with_bias(models.planted("llama")), folder / NOT_SHARED)
    dist.barrier()
    model = tensor_parallel()
    before = model(TEXTS[0]).logits
    missing = folder / ("nothing" if rank == 1 else "two")
    fails(rank, 1, FileError, "folder", lambda: bs.load_patch(model, missing))
    refused(
        BadOption,
        ("folder: ", "checksum", "on rank 1"),
        lambda: bs.load_patch(model, folder / (NOT_SHARED if rank else "two")),
    )
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr("biassurgery.saving.load._fill", interrupted_at(2))
        fails(rank, 0, KeyboardInterrupt, "^C", lambda: bs.load_patch(model, folder / "two"))
    assert not bs.patches(model)
    assert model(TEXTS[0]).logits.equal(before)
    bs.load_patch(model, folder / "two")
    assert [patch.mode.name for patch in bs.patches(model)] == ["attention_bias", "set_zero"]
    wanted = bs.load_patch(models.planted("llama"), folder / "two")
    assert model(TEXTS[0]).logits.allclose(wanted(TEXTS[0]).logits, atol=1e-4)


def interrupted_at(number: int) -> Callable[..., None]:
    """What fails when it is called for the so-manieth time."""
    calls: list[int] = []

    def fill(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt("^C")

    return fill


def exporting(rank: int, folder: Path) -> None:
    model = tensor_parallel()
    key_values = bs.calibrate_key_values(models.planted("llama"), TEXTS[:1], group=False)
    for format in ("prefix", "no format"):
        asked = format if rank == 1 else "prefix"
        call = lambda f=asked: bs.export(  # noqa: E731
            model, folder / "exported", format=f, key_values=key_values
        )
        if format == "prefix":
            call()
            assert (folder / "exported" / "prefix.safetensors").exists()
        else:
            fails(rank, 1, BadOption, "format", call)
    bs.patch_model(model, "attention_bias", kind="sink_logit")
    refused(
        UnsupportedModel,
        ("its weights lie on the ranks [0, 1]", "save_patch"),
        lambda: bs.export(model, folder / "sinks", format="sinks"),
    )
    assert not (folder / "sinks").exists()


def neurons(rank: int) -> None:
    """FSDP2: images of one rank have outlier tokens, those of the other have none."""
    ordinary = [models.images(2, seed=seed) for seed in (3, 4)]
    none = [100 * image for image in ordinary]  # norms of 1,600, where others have 3,200
    options: dict[str, Any] = {"count": 4, "layer": models.LAYER + 1, "threshold": 2500.0}
    mine = none if rank else ordinary
    model = models.planted_vit()
    found = bs.find_register_neurons(in_parts(model, model.blocks), mine, **options)
    alone = {**options, "group": False}
    wanted = bs.find_register_neurons(models.planted_vit(), ordinary + none, **alone)
    same(found, wanted)
    same(found, bs.find_register_neurons(models.planted_vit(), ordinary, **alone))


def alone(rank: int) -> None:
    """A model that a rank runs by itself is patched, saved and measured by it alone."""
    model = models.planted("llama")
    if rank == 0:
        with bs.patched(model, "attention_bias", kind="kv"):
            assert bs.perplexity(model, TEXTS, group=False) > 1
        assert isinstance(raised(lambda: bs.save_patch(model, "x")), bs.SurgeryError)
    dist.barrier()


def killed_while_saving(rank: int, folder: Path) -> None:
    """The rank that writes is killed: the other is told by its silence, and the older patch is
    whole.
    """
    be_impatient()
    model = with_bias(tensor_parallel())
    place = folder / "killed"
    bs.save_patch(model, place)
    written = contents(place)
    dist.barrier()
    if rank == 0:
        files._sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    seen = raised(lambda: bs.save_patch(model, place))
    assert type(seen) is RankFailed
    assert "rank 0 has given no sign of life for 10 s" in str(seen)
    assert [one for one in contents(place) if not one[0].endswith(".part")] == written
    bs.load_patch(models.planted("llama"), place)


def scenes(rank: int) -> None:
    folder = [os.environ["TOGETHER_FOLDER"]]
    place = Path(folder[0])
    batches(rank)
    going_on(rank, place)
    images(rank)
    patching(rank)
    saving(rank, place)
    loading(rank, place)
    exporting(rank, place)
    neurons(rank)
    alone(rank)
    # After all that they are still in step.
    found = bs.perplexity(tensor_parallel(), TEXTS)
    wanted = bs.perplexity(models.planted("llama"), TEXTS, group=False)
    assert found == pytest.approx(wanted, rel=1e-6)
    killed_while_saving(rank, place)


@pytest.mark.long
def test_what_fails_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("TOGETHER_FOLDER", str(tmp_path / "files"))
    assert run_ranks(scenes, tmp_path) == [-signal.SIGKILL, 0]
