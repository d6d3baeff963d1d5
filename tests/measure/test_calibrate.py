"""`calibrate` against a plain loop in float64 over captured hidden states, with the definition of
Sun et al. 2024.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import biassurgery as bs
from tests import models
from tests.measure.plain_calibration import Batch, check, hidden_states, plain
from tests.models import CHANNEL, DELIMITER_ID, LAYER, START_ID


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
