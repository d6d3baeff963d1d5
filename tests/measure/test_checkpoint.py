"""`checkpoint=`: what is run again and what is not, and what a file is refused for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import biassurgery as bs
from biassurgery.errors import BadOption, FileError
from biassurgery.extend import Statistic
from biassurgery.findings.files import read_tensors, write_tensors
from biassurgery.measure import checkpoint
from biassurgery.measure.statistic import STATISTICS
from tests import models, vision
from tests.measure.killing import bits
from tests.models import images, planted, tokens
from tests.state import untouched

BATCHES = 6


class Power(Exception):
    """The lights go out."""


@pytest.fixture(autouse=True)
def _written_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", float("inf"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "pass"


def data() -> list[torch.Tensor]:
    return [tokens(rows=1 + seed % 3, seed=seed) for seed in range(BATCHES)]


def until(batches: list[Any], end: int) -> Iterator[Any]:
    """The lights go out when batch number `end` is asked for."""
    yield from batches[:end]
    raise Power


def forwards(model: Any) -> list[int]:
    """Grows by the batch size at every forward."""
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


VERBS = {
    "calibrate": bs.calibrate,
    "detect": bs.detect,
    "calibrate_key_values": bs.calibrate_key_values,
    "perplexity": bs.perplexity,
}


def begun(file: Path, model: Any = None, verb: Callable[..., Any] = bs.calibrate) -> Any:
    """The model of a pass that has come to its fourth batch."""
    model = planted("llama") if model is None else model
    with pytest.raises(Power):
        verb(model, until(data(), 3), checkpoint=file)
    return model


# -- what is run


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_only_the_rest_is_run(file: Path, verb: Callable[..., Any]) -> None:
    model = planted("llama")
    seen = forwards(model)
    whole = verb(model, data())
    confirmed = verb in (bs.calibrate, bs.detect)  # by one run at the end
    trial = len(seen) - BATCHES - confirmed  # what some verbs run first to see whether they can
    seen.clear()
    with untouched(model, tokens()), pytest.raises(Power):
        verb(model, until(data(), 3), checkpoint=file)
    seen.clear()
    found = verb(model, data(), checkpoint=str(file))
    # Of key values, the one start token that all rows of a batch have.
    rows = [1 if verb is bs.calibrate_key_values else len(ids) for ids in data()[3:]]
    assert seen[trial : len(seen) - confirmed] == rows
    assert bits(found) == bits(whole)
    seen.clear()
    assert bits(verb(model, iter(data()), checkpoint=file)) == bits(whole)
    assert len(seen) == trial + confirmed  # the file stays, and holds the whole pass
    more = [*data(), tokens(seed=99)]
    assert bits(verb(model, more, checkpoint=file)) == bits(verb(model, more))
    assert [path.name for path in file.parent.iterdir()] == ["pass"]


def test_registers_and_resume_beside_a_checkpoint(file: Path) -> None:
    model = vision.planted("hub_dinov2")
    batches = [images(2, seed=seed) for seed in range(3)]
    earlier = bs.calibrate_registers(model, images(3, seed=9))
    whole = bs.calibrate_registers(model, batches, resume=earlier)
    with pytest.raises(Power):
        bs.calibrate_registers(model, until(batches, 2), resume=earlier, checkpoint=file)
    found = bs.calibrate_registers(model, batches, resume=earlier, checkpoint=file)
    assert bits(found) == bits(whole)
    sites = bs.calibrate(model, batches)
    other = file.with_name("sites")
    with pytest.raises(Power):
        bs.calibrate(model, until(batches, 2), resume=sites, checkpoint=other)
    added = bs.calibrate(model, batches, resume=sites, checkpoint=other)
    assert bits(added) == bits(bs.calibrate(model, batches, resume=sites))


def test_an_error_in_a_batch_leaves_what_was_counted_before_it(file: Path) -> None:
    """A batch that is half counted when the error comes is not in the file."""
    model = planted("llama")
    whole = bits(bs.detect(model, data()))
    block = model.model.layers[3]

    def breaks(*_: Any) -> None:
        if len(seen) == trial + 3:
            raise ZeroDivisionError

    trial = 1
    hook = block.register_forward_hook(breaks)
    seen = forwards(model)
    with pytest.raises(ZeroDivisionError):
        bs.detect(model, data(), checkpoint=file)
    hook.remove()
    seen.clear()
    assert bits(bs.detect(model, data(), checkpoint=file)) == whole
    assert len(seen) == trial + BATCHES - 2 + 1  # the run that confirms the sites


def test_random_numbers_go_on_where_they_were(file: Path) -> None:
    model = planted("llama")
    sites = bs.calibrate(model, data())
    with bs.patched(model, "noise", sites=sites, scale=5.0):
        torch.manual_seed(1)
        whole = bs.perplexity(model, data())
        after = torch.get_rng_state()
        torch.manual_seed(2)
        assert bs.perplexity(model, data()) != whole
        torch.manual_seed(1)
        begun(file, model, bs.perplexity)
        torch.manual_seed(3)
        assert bs.perplexity(model, data(), checkpoint=file) == whole
        assert torch.equal(torch.get_rng_state(), after)
    plain = file.with_name("plain")
    begun(plain, model, bs.perplexity)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    bs.perplexity(model, data(), checkpoint=plain)
    assert torch.equal(torch.get_rng_state(), before)  # not those of a model that draws none


# -- how often it is written


def test_the_file_is_written_at_bounded_intervals(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    versions = []

    def write(*arguments: Any) -> None:
        clock[0] += cost
        versions.append(round(clock[0], 3))
        write_tensors(*arguments)

    def slowly() -> Iterator[Any]:
        for _ in range(80):
            clock[0] += 0.5
            yield tokens(rows=1, length=10)

    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cost = 0.0
    bs.perplexity(planted("llama"), slowly(), checkpoint=file)
    assert versions == [0.5, 5.5, 10.5, 15.5, 20.5, 25.5, 30.5, 35.5, 40.0]
    versions.clear()
    clock[0] = 0.0
    cost = 0.2  # at most 2 % of the time
    bs.perplexity(planted("llama"), slowly(), checkpoint=file.with_name("slow"))
    assert versions == [0.7, 10.9, 21.1, 31.3, 41.0]


# -- what a file is refused for


def other_weight(model: Any) -> Any:
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] += 1e-3
    return model


def swapped_rows(model: Any) -> Any:
    weight = model.model.layers[2].mlp.up_proj.weight.data
    weight[[3, 4]] = weight[[4, 3]]
    return model


def swapped_entries(model: Any) -> Any:
    weight = model.model.layers[2].mlp.up_proj.weight.data
    weight[3, [5, 6]] = weight[3, [6, 5]]
    return model


def other_epsilon(model: Any) -> Any:
    model.model.norm.variance_epsilon = 1e-3
    return model


def other_config(model: Any) -> Any:
    model.config.rope_theta = 5.0
    return model


def with_a_patch(model: Any) -> Any:
    return bs.patch_model(model, "instrument")


CHANGES = {
    "weights": (other_weight, swapped_rows, swapped_entries),
    "configuration": (other_epsilon, other_config),
    "patches": (with_a_patch,),
}


@pytest.mark.parametrize(
    ("fact", "change"), [(fact, change) for fact, cs in CHANGES.items() for change in cs]
)
def test_another_model_is_refused(file: Path, fact: str, change: Callable[[Any], Any]) -> None:
    model = begun(file)
    content = file.read_bytes()
    other = change(copy.deepcopy(model))
    seen = forwards(other)
    with untouched(other), pytest.raises(FileError, match=f"of another pass: .*{fact} ") as caught:
        bs.calibrate(other, data(), checkpoint=file)
    assert "delete it to start anew, or name another file" in str(caught.value)
    assert not seen
    assert file.read_bytes() == content
    bs.calibrate(copy.deepcopy(model), data(), checkpoint=file)  # an equal one goes on


def test_other_levels_of_a_patch_are_refused(file: Path) -> None:
    model = planted("llama")
    for mean in (300.0, 301.0):
        with bs.patched(model, "set_mean", sites=[bs.Site(1, 2, "start", mean)]):
            if mean == 300.0:
                begun(file, model, bs.perplexity)
            else:
                with pytest.raises(FileError, match="weights"):
                    bs.perplexity(model, data(), checkpoint=file)


def test_other_adapters_of_peft_are_refused(file: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(planted("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    begun(file, model)
    with (
        model.disable_adapter(),
        pytest.raises(FileError, match="of another pass: configuration"),
    ):
        bs.calibrate(model, data(), checkpoint=file)
    bs.calibrate(model, data(), checkpoint=file)


def test_other_options_and_other_verbs_are_refused(file: Path) -> None:
    model = begun(file)
    with pytest.raises(FileError, match=r"min_ratio 1000\.0 there, 500\.0 here; delete"):
        bs.calibrate(model, data(), min_ratio=500, checkpoint=file)
    with pytest.raises(FileError, match="pass calibrating there, detecting here; statistics"):
        bs.detect(model, data(), checkpoint=file)
    with pytest.raises(FileError, match="pass calibrating there, perplexity here"):
        bs.perplexity(model, data(), checkpoint=file)
    with pytest.raises(FileError, match="architecture llama there, gpt2 here"):
        bs.calibrate(planted("gpt2"), data(), checkpoint=file)
    bs.calibrate(model, data(), min_ratio=torch.tensor(1000).item(), checkpoint=file)


def masked(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        ([*data()[1:3], data()[0], *data()[3:]], "the first one is another"),
        ([data()[0], data()[2], data()[1], *data()[3:]], "one behind the first is another"),
        ([data()[0].flip(0).flip(1), *data()[1:]], "the first one is another"),  # an equal sum
        ([*data()[:2], masked(data()[2]), *data()[3:]], "one behind the first is another"),
        ([data()[0].int(), *data()[1:]], "the first one is another"),
        (data()[:2], "has counted 3 batches, but there are 2"),
    ],
)
def test_other_data_and_another_order_are_refused(
    file: Path, batches: list[Any], what: str
) -> None:
    model = begun(file)
    seen = forwards(model)
    content = file.read_bytes()
    with untouched(model), pytest.raises(FileError, match=what):
        bs.calibrate(model, batches, checkpoint=file)
    assert not seen
    assert file.read_bytes() == content


def test_loaders_whose_order_does_not_come_again(file: Path) -> None:
    model = planted("llama")
    rows = TensorDataset(tokens(rows=8, length=10))
    shuffled: Any = DataLoader(rows, batch_size=2, shuffle=True)
    seen = forwards(model)
    for verb in VERBS.values():
        with pytest.raises(BadOption, match="checkpoint: the loader shuffles"):
            verb(model, shuffled, checkpoint=file)
    assert not file.exists()

    def seeded(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(rows, batch_size=2, shuffle=True, generator=generator)

    whole = bits(bs.calibrate(model, seeded(1), checkpoint=file))
    seen.clear()
    assert bits(bs.calibrate(model, seeded(1), checkpoint=file)) == whole
    assert len(seen) == 1  # the run that confirms the sites
    with pytest.raises(FileError, match="the first one is another"):
        bs.calibrate(model, seeded(2), checkpoint=file)


def test_a_batch_that_cannot_be_compared_is_refused(file: Path) -> None:
    model = planted("llama")
    seen = forwards(model)
    batch = {"input_ids": tokens(), "something": object()}
    with pytest.raises(BadOption, match=r"a batch holds a builtins\.object, whose contents"):
        bs.calibrate(model, batch, checkpoint=file)
    assert not seen


# -- files


def test_files_that_are_no_checkpoint(file: Path, tmp_path: Path) -> None:
    model = begun(file)
    seen = forwards(model)
    whole = file.read_bytes()
    for content in (b"", b"{", whole[:100], whole[: len(whole) // 2], whole[:-1], whole + b"x"):
        file.write_bytes(content)
        with untouched(model), pytest.raises(FileError, match=r"no checkpoint.*delete it to start"):
            bs.calibrate(model, data(), checkpoint=file)
        assert file.read_bytes() == content
    tensors, metadata = {}, {"biassurgery_checkpoint": '{"format": 99}'}
    write_tensors(file, tensors, metadata)
    with pytest.raises(FileError, match="format 99, this version reads 1"):
        bs.calibrate(model, data(), checkpoint=file)
    sites = bs.Sites([bs.Site(1, 2, "start", 300.0)])
    sites.save(file)
    with pytest.raises(FileError, match=r"it holds .*sites"):  # and stays what it is
        bs.calibrate(model, data(), checkpoint=file)
    assert bs.Sites.load(file) == sites
    for name in (tmp_path, 5, "x" * 5000):
        with pytest.raises(FileError, match="checkpoint"):
            bs.calibrate(model, data(), checkpoint=name)  # type: ignore[arg-type]
    assert not seen
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"checkpoint: .* cannot be written"):
        bs.calibrate(model, data(), checkpoint=tmp_path / "file" / "pass")


def test_states_that_lack_something(file: Path) -> None:
    model = begun(file)
    tensors, metadata = read_tensors(file)
    text = metadata["biassurgery_checkpoint"]
    for before, after in (('"massive_activations"', '"other"'), ('"keys"', '"key"')):
        changed = text.replace(before, after, 2)
        assert changed != text
        write_tensors(file, tensors, {"biassurgery_checkpoint": changed})
        with pytest.raises(FileError, match=r"is of another pass|no checkpoint that can be read"):
            bs.calibrate(model, data(), checkpoint=file)


def test_a_file_without_its_checksum_or_with_a_name_twice(file: Path) -> None:
    model = begun(file)
    tensors, metadata = read_tensors(file)
    text = metadata.pop("biassurgery_checkpoint")
    save_file(tensors, file, {"biassurgery_checkpoint": text})
    with pytest.raises(FileError, match=r"no checkpoint that can be read .*it has no checksum"):
        bs.calibrate(model, data(), checkpoint=file)
    twice = text.replace('"format": 1', '"format": 99, "format": 1')
    assert twice != text
    write_tensors(file, tensors, {"biassurgery_checkpoint": twice})
    with pytest.raises(FileError, match="a name occurs twice"):
        bs.calibrate(model, data(), checkpoint=file)


def test_a_disk_that_is_full_leaves_the_older_version(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = begun(file)
    content = file.read_bytes()

    def full(*_: Any) -> None:
        raise FileError("no space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "write_tensors", full)
        with untouched(model), pytest.raises(FileError, match=r"no space left.*still there"):
            bs.calibrate(model, data(), checkpoint=file)
    assert file.read_bytes() == content
    assert bits(bs.calibrate(model, data(), checkpoint=file)) == bits(bs.calibrate(model, data()))


# -- statistics of other packages


@pytest.fixture
def forget() -> Iterator[None]:
    known = dict(STATISTICS._classes)
    yield
    STATISTICS._classes.clear()
    STATISTICS._classes.update(known)


@pytest.mark.usefixtures("forget")
def test_statistics_that_do_not_say_what_they_have_counted(file: Path) -> None:
    class Listed(Statistic):
        name = "listed"

        def __init__(self, host: Any) -> None:
            super().__init__(host)
            self.norms: list[float] = []

        def see(self, output: Any) -> None:
            self.norms.append(float(output.hidden.double().norm()))

        def result(self) -> Any:
            return self.norms

    class Total(Listed):
        name = "total"

        def __init__(self, host: Any) -> None:
            Statistic.__init__(self, host)
            self.totals = 0.0

    class Odd(Statistic):
        name = "odd"

        def see(self, output: Any) -> None:
            self.totals["seen"] = {output.layer}

        def result(self) -> Any:
            return self.totals

    class Elsewhere(Odd):
        name = "counted_elsewhere"

        def see(self, output: Any) -> None:
            self.norm = float(output.hidden.norm())

    class Telling(Listed):
        name = "telling"

        def state(self) -> Any:
            return self.norms

        def restore(self, state: Any) -> None:
            self.norms = state

    model = planted("llama")
    seen = forwards(model)
    for name, why in (
        ("listed", "holds norms besides"),
        ("total", r"builtins\.float, which is no"),
    ):
        seen.clear()
        with pytest.raises(BadOption, match=why):
            bs.detect(model, data(), statistics=name, checkpoint=file)
        assert len(seen) <= 1  # the trial run for sinks
        assert not file.exists()
        assert bs.detect(model, data(), statistics="listed").statistics
    with pytest.raises(BadOption, match=r"holds a builtins\.set, which cannot be kept"):
        bs.detect(model, data(), statistics="odd", checkpoint=file)
    with pytest.raises(
        BadOption, match=r"'counted_elsewhere' \(.*\) has counted nothing in its `totals`"
    ):
        bs.detect(model, data(), statistics="counted_elsewhere", checkpoint=file)
    assert not file.exists()
    whole = bs.detect(model, data(), statistics="telling")
    with pytest.raises(Power):
        bs.detect(model, until(data(), 3), statistics="telling", checkpoint=file)
    found = bs.detect(model, data(), statistics="telling", checkpoint=file)
    assert len(found.statistics["telling"]) == BATCHES * models.LAYERS
    assert bits(found) == bits(whole)
