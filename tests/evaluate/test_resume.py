"""Counts that outlive an interruption: nothing is counted twice, and nothing that was counted of
something else is used.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import BadOption, FileError
from biassurgery.evaluate import LinearHead, compare, counting, linear_accuracy, top1_accuracy
from biassurgery.measure.fingerprint import digest_of, facts_of
from biassurgery.modes import SetValue
from tests.models import images, planted_vit
from tests.state import untouched
from tests.tiny_vision import CLASSES, ROWS, WIDTH, linear_input, pictures, split, tiny, winners


class Power(Exception):
    """The lights go out."""


class Loader(list[Any]):
    """Batches that count how often they are read, and may fail before one of them."""

    fail_at: int | None = None
    read = 0

    def __iter__(self) -> Iterator[Any]:
        for at, batch in enumerate(super().__iter__()):
            if at == self.fail_at:
                raise Power
            self.read += 1
            yield batch


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are written after every batch."""
    monkeypatch.setattr(counting, "_SECONDS", 0.0)


def forwards(model: Any) -> list[int]:
    """Grows by the batch size at every forward."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def half_right(model: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of which the model gets every second right: not a whole number of batches."""
    with torch.no_grad():
        said = model(x).argmax(1)
    return split(x, torch.where(torch.arange(len(x)) % 2 == 0, said, (said + 1) % CLASSES))


@pytest.mark.usefixtures("looks")
def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    model = tiny("timm")
    file = tmp_path / "new" / "counts.json"
    batches = Loader(half_right(model, pictures()))
    seen = forwards(model)
    batches.fail_at = 3
    with untouched(model), pytest.raises(Power):
        top1_accuracy(model, batches, resume=file)
    (entry,) = json.loads(file.read_text())["counts"].values()
    assert entry == {"measure": "top-1", "modes": [], "batches": 3, "right": 9, "images": 17}
    assert seen == [5, 1, 11]
    batches.fail_at = None
    assert top1_accuracy(model, batches, resume=str(file)) == 0.5
    assert seen == [5, 1, 11, 7]  # only what was left
    batches.read = 0
    assert top1_accuracy(model, batches, resume=file) == 0.5
    assert (seen, batches.read) == ([5, 1, 11, 7], 1)  # what is finished is told by the first batch
    assert top1_accuracy(model, batches) == 0.5
    assert len(seen) == 8
    assert [path.name for path in file.parent.iterdir()] == ["counts.json"]


@pytest.mark.usefixtures("looks")
def test_counts_of_another_model_head_or_data_are_not_used(tmp_path: Path) -> None:
    model = tiny("dinov2")
    file = tmp_path / "counts.json"
    x = pictures()
    heads = [LinearHead(torch.randn(CLASSES, 2 * WIDTH), torch.randn(CLASSES)) for _ in range(2)]
    said = [
        winners(linear_input("dinov2", model, x, 1) @ head.weight.double().T + head.bias.double())
        for head in heads
    ]
    assert linear_accuracy(model, split(x, said[0]), heads[0], resume=file) == 1.0
    second = linear_accuracy(model, split(x, said[0]), heads[1], resume=file)
    assert second == sum(a == b for a, b in zip(*said)) / ROWS < 1.0
    assert linear_accuracy(model, split(x, said[1]), heads[1], resume=file) == 1.0  # other labels
    assert (
        linear_accuracy(model, split(x + 0.5, said[0]), heads[0], resume=file) < 1.0
    )  # other pixels
    model.layernorm.weight.data[5] *= -30  # as training does, in one parameter
    assert linear_accuracy(model, split(x, said[0]), heads[0], resume=file) < 1.0
    assert len(json.loads(file.read_text())["counts"]) == 5


@pytest.mark.usefixtures("looks")
def test_compare_resumes_in_the_middle_of_a_mode(tmp_path: Path) -> None:
    model = planted_vit()
    x = images(24, seed=9)
    file = tmp_path / "counts.json"
    sites = bs.calibrate(planted_vit(), [images(8)])
    with torch.no_grad():
        said = model(x).argmax(1)
    batches = Loader(split(x, said))
    modes = [None, "set_zero", SetValue(0.0), SetValue(-3000.0), "set_mean"]
    whole = compare(model, lambda host: top1_accuracy(host, batches), modes, sites=sites)
    seen = forwards(model)

    def evaluate(host: Any) -> float:
        batches.fail_at = (
            2
            if any(patch.mode == SetValue(-3000.0) for patch in bs.patches(host)) and not done
            else None
        )
        return top1_accuracy(host, batches, resume=file)

    done: list[bool] = []
    with untouched(model, x), pytest.raises(Power):
        compare(model, evaluate, modes, sites=sites)
    seen.clear()
    done.append(True)
    resumed = compare(model, evaluate, modes, sites=sites)
    assert seen == [11, 7, 5, 1, 11, 7]  # the rest of the fourth mode, and the fifth
    assert [row.values for row in resumed.rows] == [row.values for row in whole.rows]
    assert len({row.values["value"] for row in resumed.rows}) > 1
    entries = json.loads(file.read_text())["counts"]
    assert [entry["modes"] for entry in entries.values()] == [
        [],
        ["set_zero"],
        ["set_value"],
        ["set_value"],
        ["set_mean"],
    ]


@pytest.mark.usefixtures("looks")
def test_more_and_fewer_batches_than_are_counted(tmp_path: Path) -> None:
    model = tiny("timm")
    file = tmp_path / "counts.json"
    batches = half_right(model, pictures())
    seen = forwards(model)
    assert top1_accuracy(model, batches[:2], resume=file) == 0.5
    with pytest.raises(BadOption, match="has counted 2 of these batches, but there are 1"):
        top1_accuracy(model, batches[:1], resume=file)
    assert top1_accuracy(model, batches, resume=file) == 0.5
    assert (
        top1_accuracy(model, iter(batches), resume=file) == 0.5
    )  # of unknown length: read to the end, but not run
    assert seen == [5, 1, 11, 7]


def test_counts_that_cannot_be_used(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    model = tiny("timm")
    x = pictures(4)
    pairs = [(x, torch.tensor([0, 1, 2, 3]))]
    for content in ("{", "[]", '{"other": 1}', '{"counts": 5}'):
        (tmp_path / "counts.json").write_text(content)
        with untouched(model), pytest.raises(FileError, match="is no file of counts"):
            top1_accuracy(model, pairs, resume=tmp_path / "counts.json")
    file = tmp_path / "counts.json"
    file.unlink()
    top1_accuracy(model, pairs, resume=file)
    (key,) = json.loads(file.read_text())["counts"]
    for entry in (5, {"batches": "many"}):
        file.write_text(json.dumps({"counts": {key: entry}}))
        with pytest.raises(FileError, match=f"holds no counts for {key}"):
            top1_accuracy(model, pairs, resume=file)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"resume: cannot write|is no file"):
        top1_accuracy(model, pairs, resume=tmp_path / "file" / "counts.json")
    shuffled: Any = DataLoader(
        TensorDataset(x, torch.tensor([0, 1, 2, 3])), batch_size=2, shuffle=True
    )
    with pytest.raises(BadOption, match="the loader shuffles"):
        top1_accuracy(model, shuffled, resume=tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


@pytest.mark.usefixtures("looks")
def test_what_changes_places_is_counted_anew(tmp_path: Path) -> None:
    """Labels and rows of a head whose sums stay as they were."""
    model = tiny("dinov2")
    file = tmp_path / "counts.json"
    x = pictures()
    head = LinearHead(torch.randn(CLASSES, 2 * WIDTH), torch.randn(CLASSES))
    logits = linear_input("dinov2", model, x, 1) @ head.weight.double().T + head.bias.double()
    said = torch.tensor(winners(logits))
    assert linear_accuracy(model, [(x, said)], head, resume=file) == 1.0
    permuted = said.roll(1)
    expected = (said == permuted).double().mean().item()
    assert linear_accuracy(model, [(x, permuted)], head, resume=file) == expected < 1.0
    other = LinearHead(head.weight.roll(1, 0), head.bias.roll(1, 0))
    expected = (said == (said + 1) % CLASSES).double().mean().item()
    assert linear_accuracy(model, [(x, said)], other, resume=file) == expected == 0.0
    assert len(json.loads(file.read_text())["counts"]) == 3


def test_a_model_is_told_by_its_weights_and_patches() -> None:
    def told() -> str:
        return json.dumps(facts_of(find_host(model), "resume"))

    model = tiny("timm")
    same = told()
    bs.patch_model(model, SetValue(5.0, channels=(1,), positions=(0,)), layers=[1])
    five = told()
    bs.unpatch_model(model)
    bs.patch_model(model, SetValue(6.0, channels=(1,), positions=(0,)), layers=[1])
    assert len({same, five, told()}) == 3
    bs.unpatch_model(model)
    assert told() == same
    found = set()
    for mean in (300.0, 301.0):  # the same mode with other levels
        with bs.patched(model, "set_mean", sites=[bs.Site(1, 2, "patch", mean)]):
            found.add(told())
    assert len(found) == 2
    model = copy.deepcopy(model).to(torch.float16)
    assert told() != same


def test_contents_are_told_apart() -> None:
    things = [
        torch.arange(3),
        torch.tensor([0, 2, 1]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1j]),
        torch.tensor([2j]),
        {"pixel_values": torch.zeros(2)},
        {"pixel_values": torch.ones(2)},
    ]
    assert len({digest_of(thing) for thing in things}) == len(things)
    assert digest_of(torch.arange(3)) == digest_of(torch.arange(6)[:3])


def test_weights_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model = tiny("timm")
    pairs = half_right(model, pictures())
    name = next(name for name, _ in model.named_parameters())
    owner = model.get_submodule(name.rpartition(".")[0])
    weight = name.rpartition(".")[2]
    setattr(owner, weight, torch.nn.Parameter(getattr(owner, weight).to("meta")))
    for argument in ("resume", "checkpoint"):
        kept: Any = {argument: tmp_path / "counts"}
        with pytest.raises(BadOption, match=f"^{argument}: {name} is on the meta device") as caught:
            top1_accuracy(model, pairs, **kept)
        assert f"leave {argument}= out, or load the model without" in str(caught.value)
    assert not list(tmp_path.iterdir())
