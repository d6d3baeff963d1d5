"""`calibrate` against a plain loop in float64 over captured hidden states, with the definition of
Sun et al. 2024.
"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import biassurgery as bs
from tests import models
from tests.models import CHANNEL, DELIMITER_ID, HIDDEN, LAYER, LAYERS, START_ID
from tests.state import untouched

Batch = dict[str, Tensor]


@dataclass
class Plain:
    """What a loop finds: the values that meet the definition, all magnitudes of their channel, and
    the median magnitudes.
    """

    hits: dict[tuple[int, int, str], list[float]] = field(default_factory=dict)
    others: dict[tuple[int, int], float] = field(default_factory=dict)
    medians: list[float] = field(default_factory=lambda: [0.0] * LAYERS)
    sequences: int = 0
    tokens: int = 0


def plain(
    model: Any,
    family: str,
    batches: list[Batch],
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
) -> Plain:
    """One sequence, one layer, one sort at a time."""
    found = Plain()
    for batch in batches:
        hidden = hidden_states(model, family, batch)
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row in range(ids.shape[0]):
            tokens = [t for t in range(ids.shape[1]) if real[row, t]]
            found.sequences += bool(tokens)
            found.tokens += len(tokens)
            if not tokens:
                continue
            starts = {tokens[0]}
            if "position_ids" in batch:
                starts |= {t for t in tokens if batch["position_ids"][row, t] == 0}
            for layer in range(LAYERS):
                values = hidden[layer][row, tokens].double()
                median = statistics.median_low(values.abs().flatten().tolist())
                found.medians[layer] += median
                massive = (values.abs() > min_magnitude) & (values.abs() > min_ratio * median)
                for token, channel in massive.nonzero().tolist():
                    role = "start" if tokens[token] in starts else "elsewhere"
                    found.hits.setdefault((layer, channel, role), []).append(
                        values[token, channel].item()
                    )
                rest = values.abs().masked_fill(massive, 0).amax(0).tolist()
                for channel in range(HIDDEN):
                    found.others[layer, channel] = max(
                        found.others.get((layer, channel), 0.0), rest[channel]
                    )
    return found


@torch.no_grad()
def hidden_states(model: nn.Module, family: str, batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
        for block in models.blocks(model, family)
    ]
    model(**batch, use_cache=False)  # with a cache, packed documents would see each other
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS
    return seen


def check(sites: bs.Sites, wanted: Plain) -> None:
    """That sites are what the loop found, where massive and ordinary values are far apart."""
    assert wanted.hits
    assert {(s.layer, s.channel, s.role) for s in sites} == set(wanted.hits)
    for site in sites:
        values = wanted.hits[site.layer, site.channel, site.role]
        other = wanted.others[site.layer, site.channel]
        smallest = min(
            abs(x)
            for place, found in wanted.hits.items()
            for x in found
            if place[:2] == (site.layer, site.channel)
        )
        assert site.cluster == 0
        assert site.count == len(values)
        assert site.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
        assert site.std == pytest.approx(statistics.pstdev(values), rel=1e-9, abs=1e-9)
        assert site.gate is not None
        assert other < site.gate < smallest
        assert site.margin == pytest.approx(smallest / other, rel=1e-6)
    assert sites.tally is not None
    assert (sites.tally.sequences, sites.tally.tokens) == (wanted.sequences, wanted.tokens)
    assert sites.tally.medians.tolist() == pytest.approx(
        wanted.medians, rel=1e-7
    )  # a float64 model is read as float32


def left_padded() -> Batch:
    """Padding made of delimiters, which would be counted if it were read."""
    ids = models.tokens(rows=3, length=14, seed=3, delimiter_at=10)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7)):
        ids[row] = torch.cat([torch.full((padding,), DELIMITER_ID), ids[row, : 14 - padding]])
        mask[row, :padding] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def right_padded() -> Batch:
    ids = models.tokens(rows=3, length=14, seed=4, delimiter_at=5)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((6, 0, 3)):
        ids[row, 14 - padding :] = START_ID
        mask[row, 14 - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def packed() -> Batch:
    """Two and three documents a row; each begins at position 0 with the start token."""
    ids = models.tokens(rows=2, length=18, seed=5, delimiter_at=4)
    positions = torch.zeros(2, 18, dtype=torch.long)
    for row, lengths in enumerate(((10, 8), (6, 5, 7))):
        at = 0
        for length in lengths:
            ids[row, at] = START_ID
            positions[row, at : at + length] = torch.arange(length)
            at += length
    return {"input_ids": ids, "position_ids": positions}


def with_an_empty_row() -> Batch:
    batch = right_padded()
    batch["attention_mask"][1] = 0
    return batch


def ordinary(seed: int = 1) -> Batch:
    return {"input_ids": models.tokens(rows=3, length=12, seed=seed)}


# -- the definition


@pytest.mark.parametrize("family", models.FAMILIES)
def test_equals_a_plain_loop(family):
    model = models.planted(family)
    batches = [ordinary(1), ordinary(2), right_padded()]
    check(bs.calibrate(model, batches), plain(model, family, batches))


@pytest.mark.parametrize(
    ("family", "make"),
    [
        (family, make)
        for family in ("llama", "gpt2", "opt", "falcon")
        for make in (left_padded, right_padded, packed, with_an_empty_row)
        if (family, make) != ("opt", packed)
    ],
)  # OPT derives its positions from the mask, so position_ids cannot pack documents
def test_padding_is_not_read_and_each_document_has_a_start(family, make):
    batch = make()
    if family == "opt":
        batch.pop("position_ids", None)
    model = models.planted(family)
    sites = bs.calibrate(model, batch)
    check(sites, plain(model, family, [batch]))
    starts = next(site.count for site in sites.at(LAYER) if site.role == "start")
    assert starts == {left_padded: 3, right_padded: 3, packed: 5, with_an_empty_row: 2}[make]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    model = models.planted("llama", dtype)
    batches = [ordinary(1), left_padded()]
    check(bs.calibrate(model, batches), plain(model, "llama", batches))


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({"min_ratio": 1e5}, set()),
        ({"min_magnitude": 1e5}, set()),
        (
            {"min_magnitude": 5000.0},
            {"start", "elsewhere"},
        ),  # only delimiters meet it, but start tokens are beyond the gate too
        ({"min_magnitude": 0.0, "min_ratio": 500.0}, {"start", "elsewhere"}),
    ],
)
def test_the_thresholds_are_arguments(options, roles):
    model = models.planted("llama")
    batch = ordinary()
    hits = {role for _, _, role in plain(model, "llama", [batch], **options).hits}
    assert hits == ({"elsewhere"} if options.get("min_magnitude") == 5000.0 else roles)
    sites = bs.calibrate(model, batch, **options)
    assert {site.role for site in sites} == roles
    assert (sites.origin.min_magnitude, sites.origin.min_ratio) == (
        options.get("min_magnitude", 100.0),
        options.get("min_ratio", 1000.0),
    )


def test_a_value_at_the_threshold_is_not_beyond_it():
    model = models.planted("llama")
    batch = {"input_ids": models.tokens(rows=1, length=12, delimiter_at=None)}
    value = hidden_states(model, "llama", batch)[LAYER][0, 0, CHANNEL].item()
    assert bs.calibrate(model, batch, min_magnitude=value).layers() == []
    assert bs.calibrate(
        model, batch, min_magnitude=math.nextafter(value, 0) * (1 - 1e-6)
    ).layers() == [1, 2, 3, 4]


def test_nothing_is_found_where_nothing_is():
    for family in models.FAMILIES:
        sites = bs.calibrate(models.planted(family), models.tokens(delimiter_at=None)[:, 1:])
        assert len(sites) == 0
        assert sites.tally is not None
        assert sites.tally.sequences == 4


def test_two_delimiters_of_different_levels_are_two_clusters():
    """A planted row more: token 2 shares the delimiter's neuron at a third of its key."""
    model = models.planted("llama")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[2] = embedding[3]
        embedding[2, models.KEYS[DELIMITER_ID]] = 0.8
    ids = models.tokens(rows=4, length=12)
    ids[:, 5] = 2
    values = {
        token: hidden_states(model, "llama", {"input_ids": ids})[LAYER][:, token, CHANNEL].double()
        for token in (5, 9)
    }
    low, high = (site for site in bs.calibrate(model, ids).at(LAYER) if site.role == "elsewhere")
    assert (low.cluster, high.cluster) == (0, 1)
    assert low.mean == pytest.approx(values[5].mean().item(), rel=1e-12)
    assert high.mean == pytest.approx(values[9].mean().item(), rel=1e-12)
    assert low.std == pytest.approx(values[5].std(unbiased=False).item(), rel=1e-9)
    assert (low.count, high.count) == (4, 4)


def test_a_vision_transformer_from_a_loader_of_pairs():
    model = models.planted_vit(reg_tokens=2)
    images = models.images(10)
    loader = DataLoader(TensorDataset(images, torch.arange(10)), batch_size=4)
    sites = bs.calibrate(model, loader)
    seen: list[Tensor] = []
    hook = model.blocks[LAYER].register_forward_hook(lambda _, __, out: seen.append(out.double()))
    with torch.no_grad():
        model(images)
    hook.remove()
    hidden = seen[0]
    medians = [statistics.median_low(image.abs().flatten().tolist()) for image in hidden]
    massive = hidden.abs() > torch.tensor([max(100.0, 1000 * m) for m in medians]).view(-1, 1, 1)
    prefix = 1 + 2
    assert set(massive.nonzero()[:, 1].tolist()) == {prefix + patch for patch in models.PATCHES}
    (site,) = sites.at(LAYER)
    values = hidden[massive]
    assert (site.channel, site.role, site.count) == (CHANNEL, "patch", 10 * len(models.PATCHES))
    assert site.mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert site.std == pytest.approx(values.std(unbiased=False).item(), rel=1e-6)
    assert sites.origin.roles == ("cls", "register:0", "register:1", "patch")
    assert sites.tally is not None
    assert sites.tally.sequences == 10


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
        with pytest.raises(bs.IncompatibleSites, match="sites"):
            bs.calibrate(model, models.tokens(), resume=resume)
    with pytest.raises(bs.BadOption, match="resume"):
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
    assert bs.calibrate(torch.compile(model, backend="eager"), ids) == wanted  # type: ignore[arg-type]


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
