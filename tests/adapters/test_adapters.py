"""The registry: who serves which model, how to make a new one known, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters import registry
from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import adapters, find_host, unwrap
from tests import models
from tests.state import output_of, untouched

THIRD_PARTY = Path(__file__).parents[1] / "third_party"


@pytest.fixture
def _own_registry(monkeypatch) -> None:
    """Whatever a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_ADAPTERS", list(adapters()))


class Twice(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2


class Unheard(nn.Module):
    """A decoder of the plainest kind, which no adapter knows; token 0 is massive in channel 3."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.hidden_size = 16
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(Twice() for _ in range(layers))
        with torch.no_grad():
            self.embedding.weight[0, 3] = 5000.0

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class UnheardAdapter(bs.TextAdapter):
    family = "unheard"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Unheard)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)  # type: ignore[arg-type]

    def width(self, model: nn.Module) -> int:
        return model.hidden_size  # type: ignore[return-value]

    def run(self, model: nn.Module, batch: Any) -> None:
        model(**batch)


IDS = torch.tensor([[0, 4, 5, 6], [0, 7, 8, 9]])


def serves(model: Unheard) -> None:
    """That the whole of the library works on the model."""
    before = output_of(model, IDS)
    sites = bs.calibrate(model, IDS)
    assert [(site.layer, site.channel, site.role, site.mean) for site in sites] == [
        (0, 3, "start", 1e4),
        (1, 3, "start", 2e4),
        (2, 3, "start", 4e4),
    ]
    with untouched(model, IDS), bs.patched(model, "set_zero", sites=sites):
        after = output_of(model, IDS)
        assert (after[:, 0, 3] == 0).all()
        assert torch.equal(after[:, 1:], before[:, 1:])


# -- built in


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_has_its_own_adapter(family):
    model = models.planted(family)
    for part in (model, model.base_model):  # with and without its head
        host = find_host(part)
        assert host.adapter.family == host.architecture == family.removesuffix("_alibi")
        assert list(map(id, host.blocks)) == list(map(id, models.blocks(model, family)))
        assert (host.width, host.roles) == (models.HIDDEN, ("start", "elsewhere"))
        assert host.model is part


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, ("cls", "patch")),
        ({"reg_tokens": 2}, ("cls", "register:0", "register:1", "patch")),
        ({"class_token": False, "global_pool": "avg"}, ("patch",)),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 1}, ("register:0", "patch")),
    ],
)
def test_the_prefix_tokens_of_a_vision_transformer_have_roles(options, roles):
    model = models.planted_vit(**options)
    host = find_host(model)
    assert (host.roles, host.width, host.architecture) == (roles, models.HIDDEN, "timm_vit")
    codes = host.adapter.token_roles(
        model, {"pixel_values": models.images(2)}, (2, len(roles) - 1 + 16)
    )
    assert codes.tolist() == [[*range(len(roles) - 1), *[len(roles) - 1] * 16]] * 2


@pytest.mark.parametrize(
    ("mask", "positions", "wanted"),
    [
        (None, None, [0, 1, 1, 1, 1]),
        ([1, 1, 1, 0, 0], None, [0, 1, 1, PADDING, PADDING]),
        ([0, 0, 1, 1, 1], None, [PADDING, PADDING, 0, 1, 1]),
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2], [PADDING, PADDING, 0, 1, 1]),
        ([0, 0, 1, 1, 1], [1, 1, 0, 1, 2], [PADDING, PADDING, 0, 1, 1]),
        (None, [0, 1, 0, 1, 2], [0, 1, 0, 1, 1]),
        ([1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, PADDING]),
        (None, [3, 4, 5, 6, 7], [0, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0], None, [PADDING] * 5),
        ([0, 1, 0, 1, 1], None, [PADDING, 0, PADDING, 1, 1]),
    ],
)
def test_the_roles_of_tokens(mask, positions, wanted):
    batch: dict[str, Tensor] = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    if mask is not None:
        batch["attention_mask"] = torch.tensor([mask])
    if positions is not None:
        batch["position_ids"] = torch.tensor([positions])
    assert UnheardAdapter().token_roles(nn.Identity(), batch, (1, 5)).tolist() == [wanted]


def test_an_import_is_cheap():
    code = (
        "import sys, biassurgery\nheavy = {'transformers', 'timm', 'open_clip', 'rich', 'typer',"
        " 'pandas', 'safetensors'} & set(sys.modules)\nassert not heavy,"
        " heavy\nbiassurgery.adapters.registry.adapters()\nheavy = {'transformers', 'timm',"
        " 'open_clip'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- not known


def test_an_unknown_architecture_is_an_error_that_names_it():
    model = Unheard()
    for call in (
        lambda: bs.calibrate(model, IDS),
        lambda: bs.patch_model(model, "set_mean"),
        lambda: bs.unpatch_model(model),
        lambda: bs.patches(model),
    ):
        with (
            untouched(model, IDS),
            pytest.raises(bs.UnsupportedModel, match=r"(?s)Unheard.*llama.*@register_adapter"),
        ):
            call()


@pytest.mark.usefixtures("_own_registry")
def test_the_error_shows_code_that_works():
    model = Unheard()
    with pytest.raises(bs.UnsupportedModel) as error:
        find_host(model)
    code = str(error.value).split("\n\n", 1)[1]
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), {"__name__": "shown"})
    assert find_host(model).architecture == "unheard"
    serves(model)


@pytest.mark.parametrize("thing", ["gpt2", None, [], nn.Linear])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(bs.UnsupportedModel, match=r"model: .*not a torch\.nn\.Module"):
        bs.calibrate(thing, IDS)


# -- made known


@pytest.mark.usefixtures("_own_registry")
def test_the_decorator_makes_a_model_known():
    assert bs.register_adapter(UnheardAdapter) is UnheardAdapter
    serves(Unheard())


@pytest.mark.usefixtures("_own_registry")
def test_the_latest_adapter_is_asked_first_and_replaces_its_namesake():
    count = len(adapters())
    bs.register_adapter(UnheardAdapter)

    @bs.register_adapter
    class Special(UnheardAdapter):
        family = "special"

        def matches(self, model: nn.Module) -> bool:
            return isinstance(model, Unheard) and len(model.layers) == 2

    assert find_host(Unheard(2)).adapter.family == "special"
    assert find_host(Unheard(3)).adapter.family == "unheard"
    bs.register_adapter(Special)
    bs.register_adapter(UnheardAdapter)
    assert len(adapters()) == count + 2
    assert find_host(models.planted("llama")).adapter.family == "llama"


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("wrong", [UnheardAdapter(), Unheard, "llama", None])
def test_only_adapter_classes_can_be_registered(wrong):
    before = adapters()
    with pytest.raises(bs.BadOption, match="adapter"):
        bs.register_adapter(wrong)
    assert adapters() == before


@pytest.mark.usefixtures("_own_registry")
def test_an_unfinished_adapter_is_told_what_it_lacks():
    class Unfinished(bs.TextAdapter):
        family = "unfinished"

        def matches(self, model: nn.Module) -> bool:
            return True

    before = adapters()
    with pytest.raises(bs.BadOption, match=r"Unfinished.*blocks.*run.*width"):
        bs.register_adapter(Unfinished)
    assert adapters() == before


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the third-party package, beside one whose entry point
    is broken.
    """
    source = tmp_path_factory.mktemp("source") / "oddformer"
    target = tmp_path_factory.mktemp("site")
    shutil.copytree(THIRD_PARTY, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    done = subprocess.run(
        [*pip, "--target", str(target), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    broken = target / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text(
        "[biassurgery.adapters]\nbroken = nowhere_to_be_found:Adapter\n"
    )
    return target


def run_with(folder: Path, code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_a_package_makes_its_model_known_by_an_entry_point(installed):
    done = run_with(
        installed,
        """
import warnings
import torch
import biassurgery as bs
from oddformer import CHANNEL, Oddformer

model, words = Oddformer().eval(), torch.tensor([[0, 4, 5, 6], [0, 7, 8, 9]])
with torch.no_grad():
    before = model(words)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    sites = bs.calibrate(model, words)
messages = [str(w.message) for w in told]
assert any("broken" in m and "nowhere_to_be_found" in m for m in messages), messages
assert sites.origin.architecture == "oddformer"
found = {(site.layer, site.channel, site.role) for site in sites}
assert found == {(layer, CHANNEL, "start") for layer in range(3)}
with bs.patched(model, "set_zero", sites=sites), torch.no_grad():
    assert (model(words) - before).abs().max() > 1
with torch.no_grad():
    assert torch.equal(model(words), before)
""",
    )
    assert done.returncode == 0, done.stderr


# -- models that cannot be served


@pytest.mark.usefixtures("_own_registry")
def test_one_block_as_several_layers_is_refused():
    bs.register_adapter(UnheardAdapter)
    model = Unheard()
    model.layers[2] = model.layers[0]
    with (
        untouched(model, IDS),
        pytest.raises(bs.UnsupportedModel, match=r"Unheard.*one block object.*deepcopy"),
    ):
        bs.patch_model(model, "set_zero", sites=[bs.Site(0, 3, "start", 1e4)])  # type: ignore[arg-type]


@pytest.mark.usefixtures("_own_registry")
def test_a_model_without_blocks_is_refused():
    bs.register_adapter(UnheardAdapter)
    with pytest.raises(bs.UnsupportedModel, match="no transformer blocks"):
        bs.calibrate(Unheard(0), IDS)


@pytest.mark.usefixtures("_own_registry")
def test_a_block_with_a_hidden_state_of_another_width_is_refused():
    class Wrong(UnheardAdapter):
        def width(self, model: nn.Module) -> int:
            return 17

    bs.register_adapter(Wrong)
    model = Unheard()
    with (
        untouched(model, IDS),
        pytest.raises(bs.UnsupportedModel, match=r"block 0.*\(2, 4, 16\).*17"),
    ):
        bs.calibrate(model, IDS)


# -- wrappers


class LikePeft(nn.Module):
    """What peft.PeftModel offers: the base model, with adapters in it, somewhere inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peft_config = {"default": object()}
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self) -> nn.Module:
        return self.base_model["model"]

    def forward(self, ids: Tensor) -> Any:
        return self.base_model["model"](ids)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "PEFT": LikePeft,
    "all of them": lambda model: nn.DataParallel(LikePeft(torch.compile(model, backend="eager"))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_found_and_patched(wrap):
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    wrapped: Any = WRAPPERS[wrap](model)
    assert unwrap(wrapped) is model
    sites = bs.calibrate(wrapped, ids)
    before = output_of(wrapped, ids)
    assert bs.patch_model(wrapped, "set_zero", sites=sites) is wrapped
    assert bs.patches(model) == bs.patches(wrapped) != ()
    assert torch.equal(output_of(wrapped, ids), output_of(model, ids))
    assert (output_of(wrapped, ids) - before).abs().max() > 0.5
    bs.unpatch_model(wrapped)
    assert torch.equal(output_of(wrapped, ids), before)


def test_blocks_that_are_compiled_one_by_one_are_found():
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    sites = bs.calibrate(model, ids)
    before = output_of(model, ids)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    assert bs.calibrate(model, ids) == sites
    with bs.patched(model, "set_zero", sites=sites):
        assert (output_of(model, ids) - before).abs().max() > 0.5
    assert torch.equal(output_of(model, ids), before)
