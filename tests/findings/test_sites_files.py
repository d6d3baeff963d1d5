"""Files that are not what a file of sites should be."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.errors import FileError
from tests.findings.hand_made import HAND_MADE, calibrated


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileError, match=path.name):
            bs.Sites.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 50, 300, -1])
def test_a_truncated_file(tmp_path, keep):
    path = tmp_path / "sites.safetensors"
    calibrated().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b'{"sites": []}', b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(1000), b"\xff" * 64],
)
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "sites.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def test_a_pickle_is_never_executed(tmp_path):
    path = tmp_path / "sites.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)
    torch.save({"x": Bomb()}, path)
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


def test_safetensors_of_something_else(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileError, match=r"weights\.safetensors"):
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
    with pytest.raises(FileError, match=r"sites\.safetensors"):
        bs.Sites.load(path)


def test_a_path_that_cannot_be_written(tmp_path):
    """A parent that is a file stands for a read-only folder, which a superuser could write to."""
    (tmp_path / "file").write_text("in the way")
    for path in (
        tmp_path / "file" / "sites.safetensors",
        tmp_path / "file" / "deeper" / "sites.safetensors",
        tmp_path,
    ):
        with pytest.raises(FileError, match=path.name):
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
    with pytest.raises(FileError, match="No space left"):
        bs.Sites().save(path)
    assert bs.Sites.load(path) == HAND_MADE
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
