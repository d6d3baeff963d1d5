"""Calibration: every form of data, resuming, and what is left of it in the model."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible
from tests import models
from tests.measure.plain_calibration import check, plain
from tests.models import CHANNEL, LAYER, planted, tokens
from tests.state import untouched

# -- what the data may look like


def test_every_form_of_the_same_data_gives_the_same_sites():
    from transformers import BatchEncoding

    model = models.planted("llama")
    ids = [models.tokens(seed=seed) for seed in (1, 2)]
    wanted = bs.calibrate(model, ids)
    assert len(wanted)
    forms: list[Any] = [
        (x for x in ids),
        tuple(ids),
        [{"input_ids": x} for x in ids],
        [BatchEncoding({"input_ids": x}) for x in ids],
        [(x, x) for x in ids],
        [[{"input_ids": x}, None] for x in ids],
        [{"input_ids": x, "labels": x} for x in ids],
        [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids],
        DataLoader(TensorDataset(torch.cat(ids)), batch_size=4),
        [{"inputs_embeds": model.get_input_embeddings()(x).detach()} for x in ids],
    ]
    for form in forms:
        assert bs.calibrate(model, form) == wanted
    for form in (
        torch.cat(ids),
        {"input_ids": torch.cat(ids)},
        [row[None] for row in torch.cat(ids)],
    ):
        for site, same in zip(bs.calibrate(model, form), wanted, strict=True):
            assert (site.layer, site.role, site.count) == (same.layer, same.role, same.count)
            assert site.mean == pytest.approx(same.mean, rel=1e-5)


def test_merge_resume_and_one_pass_agree():
    model = models.planted("llama")
    batches = [{"input_ids": models.tokens(seed=seed)} for seed in range(6)]
    whole = bs.calibrate(model, batches)
    a, b, c = (bs.calibrate(model, batches[i : i + 2]) for i in (0, 2, 4))
    resumed = bs.calibrate(
        model, iter(batches[4:]), resume=bs.calibrate(model, batches[2:4], resume=a)
    )
    check(whole, plain(model, "llama", batches))
    for merged in (a + b + c, c + (b + a), resumed):
        assert len(merged) == len(whole)
        for site, same in zip(merged, whole, strict=True):
            mine = asdict(site)
            other = asdict(same)
            assert mine.pop("mean") == pytest.approx(other.pop("mean"), rel=1e-12)
            assert mine.pop("std") == pytest.approx(other.pop("std"), rel=1e-9, abs=1e-9)
            assert mine == other
    assert any(site != same for site, same in zip(a, whole, strict=True))


def test_memory_does_not_grow_with_repeated_batches():
    model = models.planted("llama")
    batch = models.tokens()
    once = bs.calibrate(model, [batch]).tally
    often = bs.calibrate(model, [batch] * 12).tally
    assert once is not None
    assert often is not None
    assert torch.equal(often.keys, once.keys)
    assert often.sequences == 12 * once.sequences


def test_resuming_from_something_else_is_refused_before_any_work():
    model = models.planted("llama")
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    model.model.register_forward_hook(lambda *_: runs.append(1))
    theirs = bs.calibrate(models.planted("gpt2"), models.tokens())
    for resume in (
        theirs,
        bs.Sites(),
        bs.calibrate(models.planted("llama"), models.tokens(), min_ratio=500.0),
    ):
        with pytest.raises(Incompatible, match="sites"):
            bs.calibrate(model, models.tokens(), resume=resume)
    with pytest.raises(BadOption, match="resume"):
        bs.calibrate(model, models.tokens(), resume="sites.safetensors")  # type: ignore[arg-type]
    assert runs == []


def test_a_patched_model_is_measured_with_its_patch():
    model = models.planted("llama")
    ids = models.tokens()
    sites = bs.calibrate(model, ids)
    with bs.patched(model, "set_value", sites=sites, value=5000.0), untouched(model, ids):
        assert {(site.layer, site.mean, site.std) for site in bs.calibrate(model, ids)} == {
            (layer, 5000.0, 0.0) for layer in (1, 2, 3, 4)
        }
    with bs.patched(model, "set_zero", sites=sites):
        assert len(bs.calibrate(model, ids)) == 0


def test_wrapped_models_give_the_same_sites():
    model = models.planted("llama")
    ids = models.tokens()
    wanted = bs.calibrate(model, ids)
    assert bs.calibrate(nn.DataParallel(model), ids) == wanted
    compiled: Any = torch.compile(model, backend="eager")
    assert bs.calibrate(compiled, ids) == wanted


# -- the model is as it was


@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_the_model_is_untouched_and_measured_in_evaluation_mode(family):
    model = models.planted_vit(proj_drop_rate=0.5) if family == "timm" else models.planted(family)
    batch = models.images() if family == "timm" else models.tokens()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    wanted = bs.calibrate(model, batch)
    assert len(wanted)
    model.train()
    list(models.blocks(model, family))[
        3
    ].eval()  # each module's own mode comes back, not one for all
    with untouched(model, batch):
        assert bs.calibrate(model, batch) == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "timm"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(family):
    model = models.planted_vit() if family == "timm" else models.planted(family)
    good = models.images() if family == "timm" else models.tokens()
    model.train()

    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("in the middle of a forward")

    def batches() -> Any:
        yield good
        raise ZeroDivisionError("in the middle of the data")

    with untouched(model, good), pytest.raises(ZeroDivisionError, match="data"):
        bs.calibrate(model, batches())
    hook = models.blocks(model, family)[3].register_forward_hook(breaks)
    with pytest.raises(ZeroDivisionError, match="forward"):
        bs.calibrate(model, [good])
    hook.remove()
    twin = models.planted_vit() if family == "timm" else models.planted(family)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert all(m.training for m in model.modules())
    assert bs.calibrate(model, good) == bs.calibrate(twin, good)


def test_no_gradients_are_recorded():
    model = models.planted("llama")
    bs.calibrate(model, models.tokens())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_a_narrow_margin_is_told():
    """Ordinary tokens fill the channel from 1 to 1800 in steps of 1.6, so the widest gap is the one
    from 1800 to 3000.
    """
    model = models.planted("llama")
    ids = models.tokens(length=30)
    ladder = range(40, 57)
    with torch.no_grad():
        for step, token in enumerate(ladder):
            model.get_input_embeddings().weight[token, CHANNEL] = 1800 / 1.6**step
    ids[:, 10:27] = torch.tensor(ladder)
    with pytest.warns(UserWarning, match=r"layer 1 channel 7 \(1\.6[67]x\)"):
        sites = bs.calibrate(model, ids, min_magnitude=2500.0)
    assert {site.count for site in sites.at(LAYER)} == {4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.calibrate(model, models.tokens())


def test_progress_is_shown_on_demand(capsys):
    model = models.planted("llama")
    batches = [models.tokens()] * 2
    bs.calibrate(model, batches, progress=False)
    assert capsys.readouterr().err == ""
    bs.calibrate(model, batches, progress=True)
    assert "calibrating" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sites() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens()])


def test_blocks_compiled_without_graph_breaks_can_be_calibrated(sites):
    model = planted("llama")
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    assert list(bs.calibrate(model, [tokens()])) == list(sites)


def test_an_argument_that_is_none_is_not_given() -> None:
    """As transformers' own `prepare_inputs_for_generation` writes it, and as models take it."""
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    embedded = model.get_input_embeddings()(ids).detach()
    alone = {"inputs_embeds": embedded}
    beside = {"input_ids": None, "attention_mask": None, "inputs_embeds": embedded}
    assert bs.calibrate(model, beside) == bs.calibrate(model, alone) == bs.calibrate(model, ids)
    found = bs.detect(model, beside).sinks
    assert [row.attention for row in found.layers] == [
        row.attention for row in bs.detect(model, ids).sinks.layers
    ]
    key_values = bs.calibrate_key_values(model, beside)
    assert torch.equal(key_values.keys, bs.calibrate_key_values(model, ids).keys)
    labels = beside | {"labels": ids}
    assert bs.perplexity(model, labels) == pytest.approx(bs.perplexity(model, ids), rel=1e-6)
