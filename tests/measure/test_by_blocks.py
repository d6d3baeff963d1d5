"""`onload="blocks"`: all batches through one block before the next, to the same bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.data.loading import load_model
from biassurgery.errors import (
    BadOption,
    FileError,
    UnsupportedModel,
)
from biassurgery.extend import BlockOutput, Statistic, TextAdapter
from biassurgery.measure import checkpoint
from tests import encoders, models, vision
from tests.census.tiny import tiny_model
from tests.measure.killing import bits
from tests.state import fingerprint

VERBS: dict[str, Callable[..., Any]] = {
    "calibrate": bs.calibrate,
    "detect": bs.detect,
    "calibrate_key_values": bs.calibrate_key_values,
    "diagnose": bs.diagnose,
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def batches() -> list[Tensor]:
    return [models.tokens(rows=1 + seed % 3, seed=seed) for seed in range(3)]


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    return {"input_ids": models.tokens(rows=2), "attention_mask": mask}


def on_disk(folder: Path, family: str = "llama") -> Any:
    """A planted model in several files, whose blocks stay there until they are run."""
    models.planted(family).save_pretrained(folder, max_shard_size="100KB")
    return load_model(str(folder), device="cpu", onload="blocks").model


def whole(folder: Path) -> Any:
    return load_model(str(folder), device="cpu").model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight is read from its file."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    counted: Counter[str] = Counter()
    read = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, name: str) -> Tensor:
        counted[name] += 1
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return counted


def weights(model: nn.Module) -> set[str]:
    """The names of all weights that are not in memory."""
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def structure(model: nn.Module) -> tuple[dict[str, Any], set[str]]:
    """Classes, attributes and hooks of every module, and what is not in memory.

    accelerate makes other parameters at every forward.
    """
    return {k: v for k, v in fingerprint(model).items() if ":" in k}, weights(model)


def bits_or_refusal(verb: Any, model: Any, data: Any, **options: Any) -> tuple[str, str]:
    """What the verb finds block by block, and why it refuses: one of them is empty."""
    try:
        return bits(verb(model, data, **options, onload="blocks")), ""
    except UnsupportedModel as error:
        return "", str(error)


# -- the same numbers


@every_verb
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_on_disk(tmp_path: Path, family: str, verb: Callable[..., Any]) -> None:
    model = on_disk(tmp_path, family)
    before = structure(model)
    blocks = {id(module) for block in find_host(model).blocks for module in block.modules()}
    inside = [
        parameter
        for module in model.modules()
        if id(module) in blocks
        for parameter in module.parameters(recurse=False)
    ]
    assert inside
    assert all(parameter.is_meta for parameter in inside)
    found = verb(model, batches(), onload="blocks")
    assert bits(found) == bits(verb(whole(tmp_path), batches()))
    if hasattr(found, "sites"):
        assert len(found.sites)
    assert structure(model) == before  # and all weights are on disk again


@every_verb
def test_padding_and_files_between_blocks(tmp_path: Path, verb: Callable[..., Any]) -> None:
    model = models.planted("mistral")
    data = [padded(), *batches()]
    found = bits(verb(model, data))
    assert found != bits(verb(model, data[1:]))
    assert bits(verb(model, data, onload="blocks")) == found
    assert bits(verb(model, iter(data), onload="blocks", spill=tmp_path / "states")) == found
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("family", ["bert", "gemma3_text"])
def test_other_orders_of_blocks(family: str) -> None:
    """Norms behind the branches, and masks that differ from block to block."""
    torch.manual_seed(0)
    model = encoders.planted("bert") if family == "bert" else tiny_model(family).eval()
    data = [5 + ids % 50 for ids in batches()]
    options: Any = {"min_magnitude": 1.0, "min_ratio": 2.0}
    found = bs.detect(model, data, **options)
    assert len(found.sites)
    assert bits(bs.detect(model, data, **options, onload="blocks")) == bits(found)


def test_images(tmp_path: Path) -> None:
    model = vision.planted("timm_vit")
    data = [models.images(1 + seed % 3, seed=seed) for seed in range(3)]
    found = bits(bs.detect(model, data))
    assert bits(bs.detect(model, data, onload="blocks", spill=tmp_path)) == found


def test_a_patched_model() -> None:
    """Blocks are run with the patches on them, and what they return is handed on patched."""
    model = models.planted("llama")
    plain = bs.detect(model, batches())
    with bs.patched(model, "set_value", value=77.0, sites=plain.sites):
        found = bs.detect(model, batches())
        assert bits(bs.detect(model, batches(), onload="blocks")) == bits(found)
    assert bits(found) != bits(plain)


def test_a_channel_that_met_the_definition_in_an_earlier_batch() -> None:
    """What `detect` looks at in a batch depends on those before it, here as there."""
    model = models.planted("llama")
    rows = models.tokens(rows=6, seed=3)
    data = list(rows.split(1))
    limit: Any = {"min_magnitude": 2800.0, "min_ratio": 1.0}
    found = bs.detect(model, data, **limit)
    assert found.positions
    assert bits(bs.detect(model, data, **limit, onload="blocks")) == bits(found)


# -- how often weights are read, and how they come and go


def test_each_weight_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    model = on_disk(tmp_path)
    everything = weights(model)
    assert len(everything) > 40
    # Nothing is massive by this definition, so no run has to confirm anything.
    found = bs.calibrate(model, batches(), min_magnitude=1e9, onload="blocks")
    assert not len(found)
    assert reads == dict.fromkeys(everything, 1)
    reads.clear()
    bs.calibrate(model, batches(), min_magnitude=1e9)
    assert reads == dict.fromkeys(everything, len(batches()))


READINGS = {"calibrate": 2, "detect": 2, "calibrate_key_values": 1, "diagnose": 2}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("verb", VERBS)
def test_how_often_each_verb_reads(
    tmp_path: Path, reads: Counter[str], verb: str, family: str
) -> None:
    """Once, and once more where the sites that are found have to be confirmed."""
    model = on_disk(tmp_path, family)
    assert VERBS[verb](model, batches(), onload="blocks")
    assert reads == dict.fromkeys(weights(model), READINGS[verb])


def test_where_nothing_is_massive_detect_reads_once(tmp_path: Path, reads: Counter[str]) -> None:
    """Whether sinks can be measured is asked without weights."""
    model = on_disk(tmp_path)
    found = bs.detect(model, batches(), min_magnitude=1e9, onload="blocks")
    assert not len(found.sites)
    assert found.sinks is not None
    assert reads == dict.fromkeys(weights(model), 1)


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = on_disk(tmp_path)
    blocks = find_host(model).blocks
    present: list[list[int]] = []

    class Present(Statistic):
        in_batch = ()

        def see(self, output: BlockOutput) -> None:
            there = [not next(block.mlp.parameters()).is_meta for block in blocks]
            present.append([layer for layer, here in enumerate(there) if here])

        def result(self) -> None: ...

    from biassurgery.measure.by_blocks import by_blocks
    from biassurgery.measure.one_pass import Pass

    host = find_host(model)
    one_pass = Pass(host, 100.0, 1000.0, [Present(host)])
    data = [{"input_ids": ids} for ids in batches()]
    one_pass.read(data, "looking", False, blocks=by_blocks(host, "blocks", None))
    assert present == [[layer] for layer in range(len(blocks)) for _ in data]


def test_weights_in_memory_that_are_brought_to_the_device() -> None:
    """`cpu_offload`: accelerate's hooks bring them from a dict of tensors."""
    from accelerate import cpu_offload

    model = models.planted("llama")
    found = bits(bs.detect(model, batches()))
    cpu_offload(model, torch.device("cpu"))
    assert bits(bs.detect(model, batches(), onload="blocks")) == found


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    model = on_disk(tmp_path / "model")
    before = structure(model)
    whole_result = bits(bs.calibrate(model, batches(), onload="blocks"))
    mlp = type(find_host(model).blocks[2].mlp)
    forward = mlp.forward
    calls: list[int] = []

    def failing(self: Any, x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 8:  # of three batches: in the third block
            raise fault
        return forward(self, x)

    with monkeypatch.context() as faults:
        faults.setattr(mlp, "forward", failing)
        for block in find_host(model).blocks:  # accelerate calls the forward that it found
            faults.setattr(block.mlp, "_old_forward", failing.__get__(block.mlp))
        with pytest.raises(fault):
            bs.calibrate(model, batches(), onload="blocks", spill=tmp_path / "states")
    assert len(calls) == 8
    assert not list((tmp_path / "states").iterdir())
    assert structure(model) == before
    assert bits(bs.calibrate(model, batches(), onload="blocks")) == whole_result


# -- going on after an interruption


class Killed(BaseException):
    """Nothing that anybody catches."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A checkpoint is written behind every block."""
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", float("inf"))
    return


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("verb", [bs.calibrate, bs.detect, bs.calibrate_key_values])
def test_a_pass_goes_on_at_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Any, reads: Counter[str]
) -> None:
    model = on_disk(tmp_path / "model")
    options = {
        "onload": "blocks",
        "checkpoint": tmp_path / "pass",
        "spill": tmp_path / "states",
    }
    found = bits(verb(model, batches()))
    with monkeypatch.context() as faults:
        write = checkpoint.write_tensors
        written: list[int] = []

        def dies(*what: Any) -> None:
            write(*what)
            written.append(1)
            if len(written) == 3:
                raise Killed

        faults.setattr(checkpoint, "write_tensors", dies)
        with pytest.raises(Killed):
            verb(model, batches(), **options)
    reads.clear()
    assert bits(verb(model, batches(), **options)) == found
    layers = Counter[int]()
    for name, count in reads.items():
        if ".self_attn.q_proj." in name:
            layers[int(name.split(".")[2])] = count
    # The blocks that were counted are read less often by once; but the trial of a transplant, which
    # no checkpoint holds, goes through all of them.
    again = 0 if verb is bs.calibrate_key_values else 1
    assert {layers[3] - layers[layer] for layer in (0, 1, 2)} == {again}
    assert layers[3] == layers[4] >= 1
    with pytest.raises(FileError, match=r"data .* there, .* here"):
        verb(model, batches()[:2], **options)
    (tmp_path / "model" / "model.safetensors.index.json").touch()
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.write_bytes(file.read_bytes())  # the same again, at another time
    with pytest.raises(FileError, match=r"weights .* there, .* here"):
        verb(model, batches(), **options)


@pytest.mark.usefixtures("often")
def test_passes_whose_checkpoints_have_one_name_share_no_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of ranks, of models in a loop, or of other data in another folder."""
    model = models.planted("llama")
    options: Any = {"onload": "blocks", "spill": tmp_path / "states"}
    others = [models.tokens(rows=1 + seed % 3, seed=seed + 10) for seed in range(3)]
    found = bits(bs.calibrate(model, batches()))
    assert found != bits(bs.calibrate(model, others))
    write = checkpoint.write_tensors
    for data, name in ((batches(), "one"), (others, "two")):
        written: list[int] = []

        def dies(*what: Any, written: list[int] = written) -> None:
            write(*what)
            written.append(1)
            if len(written) == 3:
                raise Killed

        (tmp_path / name).mkdir()
        with monkeypatch.context() as faults:
            faults.setattr(checkpoint, "write_tensors", dies)
            with pytest.raises(Killed):
                bs.calibrate(model, data, **options, checkpoint=tmp_path / name / "pass")
    (tmp_path / "one" / "pass").rename(tmp_path / "pass")
    assert bits(bs.calibrate(model, batches(), **options, checkpoint=tmp_path / "pass")) == found


@pytest.mark.usefixtures("often")
def test_hidden_states_that_are_gone(tmp_path: Path) -> None:
    import shutil

    model = models.planted("llama")
    options: Any = {"onload": "blocks", "checkpoint": tmp_path / "pass", "spill": tmp_path / "at"}
    bs.calibrate(model, batches(), **options)
    shutil.rmtree(tmp_path / "at")
    with pytest.raises(FileError, match=r"^spill: .*which the checkpoint needs"):
        bs.calibrate(model, batches(), **options)


# -- what is refused, before anything is changed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"onload": "layers"}, "^onload: 'layers'; use 'blocks'"),
        ({"spill": "states"}, "^spill: states is for hidden states .* onload='blocks'"),
        ({"onload": "blocks", "checkpoint": "pass"}, "^checkpoint: .* give spill="),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadOption, match=why):
        bs.calibrate(models.planted("llama"), batches(), **options)
    assert not list(tmp_path.iterdir())


def test_remedies_are_not_measured() -> None:
    with pytest.raises(BadOption, match=r"^measure: True, with onload='blocks'"):
        bs.diagnose(models.planted("llama"), batches(), measure=True, onload="blocks")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("")
    with pytest.raises(FileError, match=r"^spill: .* cannot be a folder"):
        bs.calibrate(models.planted("llama"), batches(), onload="blocks", spill=tmp_path / "states")


def test_a_statistic_that_does_not_say_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from biassurgery.measure.statistic import STATISTICS

    monkeypatch.setattr(STATISTICS, "_classes", dict(STATISTICS._classes), raising=False)

    class Jumps(Statistic):
        name = "jumps_between_blocks"

        def begin(self, batch: Any) -> None:
            self._before: Tensor | None = None

        def see(self, output: BlockOutput) -> None:
            before = output.hidden if self._before is None else self._before
            self.totals.add(output.layer, (output.hidden - before).double().norm())
            self._before = output.hidden

        def result(self) -> dict[Any, float]:
            return {layer: float(total) for layer, total in self.totals.items()}

    model = models.planted("llama")
    rows = [models.tokens(rows=2, seed=seed) for seed in range(2)]
    jumps: Any = {"statistics": (Jumps.name,)}
    with pytest.raises(BadOption, match=r"^onload: the statistic 'jumps_between_blocks'.*in_batch"):
        bs.detect(model, rows, **jumps, onload="blocks")
    found = bs.detect(model, rows, **jumps).statistics
    Jumps.in_batch = ()  # a lie: what it knows of a batch is lost behind every block
    assert bs.detect(model, rows, **jumps, onload="blocks").statistics != found
    Jumps.in_batch = ("_before",)
    assert bs.detect(model, rows, **jumps, onload="blocks").statistics == found


class Toy(nn.Module):
    """Blocks that hand on something besides the stream, each kind in its own way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(100, 32)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(3))
        self.kind = kind

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        seen = [hidden]
        for layer in list(self.layers) * (2 if self.kind == "looped" else 1):
            layer.remembers = self.kind == "remembered"
            extra = sum(seen) if self.kind == "dense" else None
            hidden = layer(hidden, extra)
            seen.append(hidden)
        return hidden


class ToyBlock(nn.Module):
    remembers = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.last: Tensor | None = None

    def forward(self, hidden: Tensor, extra: Tensor | None) -> Tensor:
        out = hidden + self.linear(hidden).tanh()
        if self.remembers:
            self.last = out
        return out if extra is None else out + 0.1 * extra


class ToyAdapter(TextAdapter):
    family = "toy"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, Toy)
        return list(model.layers)

    def width(self, model: nn.Module) -> int:
        return 32


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dense", "block 2 is given more of the blocks before it than the residual stream"),
        ("remembered", "block 0 changes 'last' of its ToyBlock as it runs"),
        ("looped", "ran twice in one forward"),
    ],
)
def test_toys_whose_blocks_need_each_other(
    monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    monkeypatch.setattr("biassurgery.adapters.registry._ADAPTERS", [ToyAdapter()])
    data = batches()
    options: Any = {"min_magnitude": 0.0, "min_ratio": 3.0}
    plain = bs.calibrate(Toy("plain"), data, **options)
    assert len(plain)
    assert bits(bs.calibrate(Toy("plain"), data, **options, onload="blocks")) == bits(plain)
    model = Toy(kind)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=why):
        bs.calibrate(model, data, **options, onload="blocks")
    left = fingerprint(model)
    assert {k: v for k, v in left.items() if not k.endswith(":attributes")} == {
        k: v for k, v in before.items() if not k.endswith(":attributes")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gemma3n_text", "block 0 is given a (KVSharingDict|DynamicCache), in which one block"),
        ("glm_moe_dsa", "block 1 is given more of the blocks before it than the residual stream"),
        ("xlstm", "block 0 returns a tuple whose parts are not all tensors"),
    ],
)
def test_blocks_that_hand_on_more_than_the_stream(model_type: str, why: str) -> None:
    """In transformers 4 some hand on nothing where there is no cache, or are not there."""
    of_4 = transformers.__version__.startswith("4.")
    if of_4 and model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    options: Any = {"min_magnitude": 1.0, "min_ratio": 2.0}
    ids = 5 + models.tokens(rows=2, length=12) % 50
    model = tiny_model(model_type).eval()
    found = bits(bs.calibrate(model, ids, **options))
    before = fingerprint(model)
    here, refusal = bits_or_refusal(bs.calibrate, model, ids, **options)
    assert re.search(why, refusal) or (of_4 and here == found)
    assert fingerprint(model) == before
