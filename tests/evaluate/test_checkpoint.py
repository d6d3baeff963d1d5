"""`checkpoint=` of evaluations: labelled images, `compare`, and beside `resume=`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, FileError
from biassurgery.evaluate import LinearHead, compare, counting, linear_accuracy, top1_accuracy
from biassurgery.measure import checkpoint
from biassurgery.modes import SetValue
from tests.models import planted, tokens
from tests.state import untouched
from tests.tiny_vision import CLASSES, WIDTH, pictures, split, tiny


class Power(Exception):
    """The lights go out."""


@pytest.fixture(autouse=True)
def _written_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", float("inf"))


def until(batches: list[Any], end: int) -> Iterator[Any]:
    yield from batches[:end]
    raise Power


def labelled(model: Any) -> list[Any]:
    """Pairs of which the model gets every second right."""
    x = pictures()
    with torch.no_grad():
        said = model(x).argmax(1)
    return split(x, torch.where(torch.arange(len(x)) % 2 == 0, said, (said + 1) % CLASSES))


def test_an_accuracy_goes_on(tmp_path: Path) -> None:
    model = tiny("timm")
    pairs = labelled(model)
    file = tmp_path / "count"
    with untouched(model), pytest.raises(Power):
        top1_accuracy(model, until(pairs, 2), checkpoint=file)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert top1_accuracy(model, pairs, checkpoint=file) == 0.5
    assert seen == [11, 7]
    assert top1_accuracy(model, pairs, checkpoint=file) == 0.5
    assert seen == [11, 7]
    other = [(x, (labels + 1) % CLASSES) for x, labels in pairs]
    with pytest.raises(FileError, match="the first one is another"):
        top1_accuracy(model, other, checkpoint=file)
    with pytest.raises(BadOption, match=r"checkpoint: .*, but also resume"):
        top1_accuracy(model, pairs, checkpoint=file, resume=tmp_path / "counts.json")
    assert not (tmp_path / "counts.json").exists()


def test_another_head_is_refused(tmp_path: Path) -> None:
    model = tiny("dinov2")
    pairs = split(pictures(), torch.zeros(24, dtype=torch.int64))
    heads = [LinearHead(torch.randn(CLASSES, 2 * WIDTH), torch.randn(CLASSES)) for _ in range(2)]
    whole = linear_accuracy(model, pairs, heads[0])
    with pytest.raises(Power):
        linear_accuracy(model, until(pairs, 2), heads[0], checkpoint=tmp_path / "count")
    with pytest.raises(FileError, match="of another pass: head "):
        linear_accuracy(model, pairs, heads[1], checkpoint=tmp_path / "count")
    assert linear_accuracy(model, pairs, heads[0], checkpoint=tmp_path / "count") == whole


def test_counts_are_looked_at_no_more_often_than_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the counts waits for the device."""
    monkeypatch.setattr(checkpoint, "_SECONDS", 100.0)
    looks: list[int] = []
    settle = counting._Counting.settle
    monkeypatch.setattr(
        counting._Counting, "settle", lambda self: (looks.append(1), settle(self))[1]
    )
    model = tiny("timm")
    top1_accuracy(model, labelled(model), checkpoint=tmp_path / "count")
    assert (
        len(looks) <= 4
    )  # before the pass, behind the first batch, behind the last one, at the end


def test_compare_goes_on_in_the_middle_of_a_mode(tmp_path: Path) -> None:
    model = planted("llama")
    batches = [tokens(rows=2, seed=seed) for seed in range(4)]
    sites = bs.calibrate(model, batches)
    modes = [None, "set_zero", SetValue(-3000.0), SetValue(0.0), "set_mean"]
    whole = compare(model, lambda host: bs.perplexity(host, batches), modes, sites=sites)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: seen.append(1))

    def broken(host: Any, checkpoint: Path) -> float:
        is_third = any(patch.mode == SetValue(-3000.0) for patch in bs.patches(host))
        return bs.perplexity(
            host, until(batches, 2) if is_third else batches, checkpoint=checkpoint
        )

    def evaluate(host: Any, **options: Any) -> float:
        return bs.perplexity(host, batches, **options)

    file = tmp_path / "new" / "table"
    with untouched(model, batches[0]), pytest.raises(Power):
        compare(model, broken, modes, sites=sites, checkpoint=file)
    seen.clear()
    found = compare(model, evaluate, modes, sites=sites, checkpoint=str(file))
    assert len(seen) == 2 + 4 + 4  # the rest of the third mode, the fourth and the fifth
    assert [row.values for row in found.rows] == [row.values for row in whole.rows]
    assert len({row.values["value"] for row in found.rows}) > 2
    names = sorted(path.name for path in file.parent.iterdir())
    assert [name[: len("table.set_value.")] for name in names] == [
        "table.original",
        "table.set_mean",
        "table.set_value.",
        "table.set_value.",
        "table.set_zero",
    ]
    other = bs.Sites([bs.Site(1, 7, "start", 50.0)])
    with pytest.raises(FileError, match="of another pass"):
        compare(model, evaluate, [None, "set_mean"], sites=other, checkpoint=file)


def test_an_evaluation_that_takes_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model = planted("llama")
    with untouched(model), pytest.raises(BadOption, match=r"evaluate: it cannot be called with"):
        compare(model, lambda host: 1.0, [None], checkpoint=tmp_path / "table")
    assert not list(tmp_path.iterdir())
