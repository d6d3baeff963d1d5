"""`Sites`: a value that cannot change, its file, and its sum."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadOption, Incompatible
from biassurgery.findings.tally import Tally
from tests.findings.hand_made import HAND_MADE, calibrated


def add(a: Any, b: Any) -> Any:
    return a + b


def as_rows(sites: bs.Sites) -> list[dict]:
    return [dataclasses.asdict(site) for site in sites]


def test_a_sequence_of_sites():
    first, second, third = HAND_MADE
    assert len(HAND_MADE) == 3
    assert HAND_MADE[0] is first
    assert HAND_MADE[-1] is third
    assert list(HAND_MADE[:2]) == [first, second]
    assert HAND_MADE[:2].origin == HAND_MADE.origin
    assert second in HAND_MADE
    assert HAND_MADE.layers() == [1, 4]
    assert list(HAND_MADE.at(4)) == [third]
    assert list(HAND_MADE.at(2)) == []
    assert HAND_MADE.at(1).origin == HAND_MADE.origin
    assert list(bs.Sites()) == []
    assert "3 sites" in repr(HAND_MADE)
    assert "llama" in repr(HAND_MADE)


def test_sites_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HAND_MADE[0].mean = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        HAND_MADE[0] = HAND_MADE[1]  # type: ignore[index]
    same = bs.Sites(list(HAND_MADE), origin=HAND_MADE.origin)
    assert same == HAND_MADE
    assert hash(same) == hash(HAND_MADE)
    assert bs.Sites(list(HAND_MADE)) != HAND_MADE
    assert HAND_MADE[:2] != HAND_MADE
    assert list(HAND_MADE) != HAND_MADE


@pytest.mark.parametrize("wrong", [[{"layer": 1}], ["start"], [None]])
def test_only_sites_are_sites(wrong):
    with pytest.raises(BadOption, match="Site"):
        bs.Sites(wrong)


def test_a_file_gives_back_every_number(tmp_path):
    path = tmp_path / "new" / "folder" / "sites.safetensors"
    HAND_MADE.save(path)
    again = bs.Sites.load(str(path))
    assert again == HAND_MADE
    assert as_rows(again) == as_rows(HAND_MADE)
    assert again.tally is None
    bs.Sites().save(path)  # writes over it
    assert bs.Sites.load(path) == bs.Sites()


def test_the_header_can_be_read_without_this_library(tmp_path):
    """safetensors: 8 bytes little-endian length, then JSON."""
    HAND_MADE.save(tmp_path / "sites.safetensors")
    raw = (tmp_path / "sites.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["biassurgery.sites"])
    assert header["format"] == 1
    assert [site["mean"] for site in header["sites"]] == [3000.0, -9000.5, 1 / 3]
    assert header["origin"]["architecture"] == "llama"


def test_a_calibration_adds_up_after_a_file_as_before(tmp_path):
    a = calibrated(1)
    b = calibrated(2)
    a.save(tmp_path / "a.safetensors")
    loaded = bs.Sites.load(tmp_path / "a.safetensors")
    assert loaded == a
    assert loaded.tally is not None
    assert a.tally is not None
    for field in dataclasses.fields(Tally):
        ours = getattr(loaded.tally, field.name)
        theirs = getattr(a.tally, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert as_rows(loaded + b) == as_rows(a + b)
    assert as_rows(a) != as_rows(a + b)


def test_resuming_into_the_same_file(tmp_path):
    """What is loaded may still lie in the file, so writing must not go over it in place."""
    path = tmp_path / "sites.safetensors"
    a = calibrated(1)
    b = calibrated(2)
    a.save(path)
    (bs.Sites.load(path) + b).save(path)
    assert as_rows(bs.Sites.load(path)) == as_rows(a + b)
    assert as_rows(bs.Sites.load(path) + a) == as_rows(a + b + a)


def test_a_sum_joins_the_sources():
    a = calibrated(source="left")
    b = calibrated(source="right")
    assert (a + b).origin.source == "left + right"
    assert (a + a).origin.source == "left"
    assert (a + calibrated()).origin.source == "left"


def test_pickle_keeps_sites():
    sites = calibrated()
    again = pickle.loads(pickle.dumps(sites))
    assert again == sites
    assert as_rows(again + sites) == as_rows(sites + sites)


@pytest.mark.parametrize(
    "name", ["architecture", "layers", "width", "roles", "min_magnitude", "min_ratio"]
)
def test_calibrations_of_different_things_do_not_add_up(name):
    a = calibrated()
    other = {
        "architecture": "gpt2",
        "layers": 6,
        "width": 65,
        "roles": ("cls",),
        "min_magnitude": 50.0,
        "min_ratio": 10.0,
    }[name]
    b = bs.Sites(list(a), origin=dataclasses.replace(a.origin, **{name: other}), tally=a.tally)
    with pytest.raises(Incompatible, match=name):
        add(a, b)


def test_sites_without_a_tally_do_not_add_up():
    for a, b in (
        (calibrated(), HAND_MADE),
        (HAND_MADE, calibrated()),
        (calibrated(), calibrated()[:1]),
    ):
        with pytest.raises(Incompatible, match="tally"):
            add(a, b)
    with pytest.raises(TypeError):
        add(calibrated(), [HAND_MADE[0]])


def test_sites_take_numbers_of_numpy_and_refuse_words(tmp_path):
    site = bs.Site(
        np.int64(1),
        np.int64(7),
        "start",
        np.float32(3.5),
        std=np.float64(0.5),
        count=torch.tensor(4),
    )
    assert (type(site.layer), type(site.mean), site.count) == (int, float, 4)
    bs.Sites([site]).save(tmp_path / "sites.safetensors")
    assert list(bs.Sites.load(tmp_path / "sites.safetensors")) == [site]
    for wrong in (dict(layer="1"), dict(layer=1.5), dict(mean="x"), dict(mean=None)):
        with pytest.raises(BadOption, match=next(iter(wrong))):
            bs.Site(**{**dict(layer=1, channel=7, role="start", mean=3.0), **wrong})
