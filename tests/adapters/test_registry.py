"""How adapters are found, registered and refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.adapters.registry import adapters, find_host
from biassurgery.errors import BadOption, UnsupportedModel
from tests import models
from tests.adapters.unheard import Unheard, UnheardAdapter
from tests.state import output_of, untouched

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
            pytest.raises(UnsupportedModel, match=r"(?s)Unheard.*llama.*@register_adapter"),
        ):
            call()


@pytest.mark.usefixtures("_own_registry")
def test_the_error_shows_code_that_works():
    model = Unheard()
    with pytest.raises(UnsupportedModel) as error:
        find_host(model)
    code = str(error.value).split("\n\n", 1)[1]
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), {"__name__": "shown"})
    assert find_host(model).architecture == "unheard"
    serves(model)


@pytest.mark.parametrize("thing", ["gpt2", None, [], nn.Linear])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(UnsupportedModel, match=r"model: .*not a torch\.nn\.Module"):
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
    with pytest.raises(BadOption, match="adapter"):
        bs.register_adapter(wrong)
    assert adapters() == before


@pytest.mark.usefixtures("_own_registry")
def test_an_unfinished_adapter_is_told_what_it_lacks():
    class Unfinished(bs.extend.TextAdapter):
        family = "unfinished"

        def matches(self, model: nn.Module) -> bool:
            return True

    before = adapters()
    with pytest.raises(BadOption, match=r"Unfinished.*blocks, width;"):
        bs.register_adapter(Unfinished)
    assert adapters() == before


# -- models that cannot be served


@pytest.mark.usefixtures("_own_registry")
def test_one_block_as_several_layers_is_refused():
    bs.register_adapter(UnheardAdapter)
    model = Unheard()
    model.layers[2] = model.layers[0]
    with (
        untouched(model, IDS),
        pytest.raises(UnsupportedModel, match=r"Unheard.*one block object.*deepcopy"),
    ):
        bs.patch_model(model, "set_zero", sites=[bs.Site(0, 3, "start", 1e4)])


@pytest.mark.usefixtures("_own_registry")
def test_a_model_without_blocks_is_refused():
    bs.register_adapter(UnheardAdapter)
    with pytest.raises(UnsupportedModel, match="no transformer blocks"):
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
        pytest.raises(UnsupportedModel, match=r"block 0.*\(2, 4, 16\).*17"),
    ):
        bs.calibrate(model, IDS)
