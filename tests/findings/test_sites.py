"""`Sites`: a value that cannot change, its file, and its sum."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.findings.tally import Tally
from tests import models

HAND_MADE = bs.Sites(
    [
        bs.Site(layer=1, channel=7, role="start", mean=3000.0),
        bs.Site(
            layer=1,
            channel=7,
            role="elsewhere",
            mean=-9000.5,
            std=12.25,
            count=40,
            gate=750.0,
            margin=13591.0,
            cluster=1,
        ),
        bs.Site(
            layer=4,
            channel=63,
            role="start",
            mean=1 / 3,
            std=1e-300,
            count=2**40,
            gate=0.1,
            margin=math.inf,
        ),
    ],
    origin=bs.Origin("llama", 5, 64, ("start", "elsewhere"), 100.0, 1000.0, "ünïcode text"),
)


def calibrated(seed: int = 1, **options) -> bs.Sites:
    return bs.calibrate(models.planted("llama"), [models.tokens(seed=seed)], **options)


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
    with pytest.raises(bs.BadOption, match="Site"):
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
    with pytest.raises(bs.IncompatibleSites, match=name):
        add(a, b)


def test_sites_without_a_tally_do_not_add_up():
    for a, b in (
        (calibrated(), HAND_MADE),
        (HAND_MADE, calibrated()),
        (calibrated(), calibrated()[:1]),
    ):
        with pytest.raises(bs.IncompatibleSites, match="tally"):
            add(a, b)
    with pytest.raises(TypeError):
        add(calibrated(), [HAND_MADE[0]])


# -- files that are not what they should be


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(bs.FileError, match=path.name):
            bs.Sites.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 50, 300, -1])
def test_a_truncated_file(tmp_path, keep):
    path = tmp_path / "sites.safetensors"
    calibrated().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(bs.FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b'{"sites": []}', b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(1000), b"\xff" * 64],
)
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "sites.safetensors"
    path.write_bytes(content)
    with pytest.raises(bs.FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def test_a_pickle_is_never_executed(tmp_path):
    path = tmp_path / "sites.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(bs.FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)
    torch.save({"x": Bomb()}, path)
    with pytest.raises(bs.FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


def test_safetensors_of_something_else(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(bs.FileError, match=r"weights\.safetensors"):
        bs.Sites.load(path)


ORIGIN = {
    "architecture": None,
    "layers": None,
    "width": None,
    "roles": [],
    "min_magnitude": None,
    "min_ratio": None,
    "source": "",
}
BROKEN = {
    "not json": "{",
    "not an object": "[1]",
    "no format": json.dumps({"origin": ORIGIN, "sites": []}),
    "another format": json.dumps({"format": 2, "origin": ORIGIN, "sites": []}),
    "no sites": json.dumps({"format": 1, "origin": ORIGIN}),
    "no origin": json.dumps({"format": 1, "sites": []}),
    "a field too many in the origin": json.dumps(
        {"format": 1, "origin": ORIGIN | {"planet": "Mars"}, "sites": []}
    ),
    "roles are no list": json.dumps({"format": 1, "origin": ORIGIN | {"roles": 3}, "sites": []}),
    "a site without a mean": json.dumps(
        {"format": 1, "origin": ORIGIN, "sites": [{"layer": 1, "channel": 2, "role": "start"}]}
    ),
    "a site that is a number": json.dumps({"format": 1, "origin": ORIGIN, "sites": [3]}),
    "a tally without its tensors": json.dumps(
        {"format": 1, "origin": ORIGIN, "sites": [], "sequences": 1, "tokens": 1}
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_header_that_is_broken(tmp_path, case):
    path = tmp_path / "sites.safetensors"
    save_file({"none": torch.zeros(1)}, path, {"biassurgery.sites": BROKEN[case]})
    with pytest.raises(bs.FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


def test_a_path_that_cannot_be_written(tmp_path):
    """A parent that is a file stands for a read-only folder, which a superuser could write to."""
    (tmp_path / "file").write_text("in the way")
    for path in (
        tmp_path / "file" / "sites.safetensors",
        tmp_path / "file" / "deeper" / "sites.safetensors",
        tmp_path,
    ):
        with pytest.raises(bs.FileError, match=path.name):
            HAND_MADE.save(path)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sites.safetensors"
    HAND_MADE.save(path)

    def fails_half_way(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails_half_way)
    with pytest.raises(bs.FileError, match="No space left"):
        bs.Sites().save(path)
    assert bs.Sites.load(path) == HAND_MADE
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
