"""Names that are no files, and files that no version wrote: each loader refuses them alike."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.reading import image_files, read_text
from biassurgery.errors import BadOption, FileError
from biassurgery.evaluate import LinearHead
from biassurgery.evaluate.resume import Count, CountFile
from biassurgery.findings.files import CHECKSUM, checksum_of
from tests import models
from tests.findings.hand_made import HAND_MADE, calibrated
from tests.findings.test_files import FINDINGS, parts, same
from tests.refusals import IDS, SITES
from tests.state import untouched

FINDERS: dict[str, Callable[[Any], Any]] = {
    cls.__name__: cls.load for cls in (bs.Sites, bs.KeyValues, bs.RegisterMeans, bs.RegisterNeurons)
}
LOADERS: dict[str, Callable[[Any], Any]] = {
    **FINDERS,
    "LinearHead": LinearHead.load,
    "load_patch": lambda path: bs.load_patch(models.planted("llama"), path),
    "read_text": read_text,
    "image_files": lambda path: image_files(path, None),
    "load_model": load_model,
    "weights": lambda path: load_model("vit_tiny_patch16_224", weights=path),
}
WRITERS: dict[str, Callable[[Any], Any]] = {
    "Sites.save": HAND_MADE.save,
    "save_patch": lambda path: bs.save_patch(
        bs.patch_model(models.planted("llama"), "set_zero", sites=SITES), path
    ),
    "counts": lambda path: CountFile(path, "key", "name", models.planted("llama")).write(Count()),
}
NO_NAMES = (None, 3, b"file", "", "x" * 5000, "a\0b", "~/nothing/here", "\ud800", ["a"])


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name)[:12])
@pytest.mark.parametrize("use", [*LOADERS, *WRITERS])
def test_what_is_no_name(use: str, name: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    # without a name of weights a hub is asked, which can take its time to be out of reach
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if use == "load_model" and not isinstance(name, str):
        return  # the command line gives it nothing but strings
    with pytest.raises(FileError) as raised:
        (LOADERS | WRITERS)[use](name)
    assert len(str(raised.value)) < 400
    assert list(tmp_path.iterdir()) == []


def in_the_way(folder: Path) -> dict[str, Path]:
    """Names of what is there, but no file that could be read."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("text")
    os.mkfifo(folder / "fifo")
    (folder / "to fifo").symlink_to(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    names = ("folder", "fifo", "to fifo", "loop", "absent", "file/below", "../absent")
    return {name: folder / name for name in names}


@pytest.mark.parametrize("use", [name for name in LOADERS if name not in ("read_text",)])
def test_what_is_no_file(use: str, tmp_path: Path) -> None:
    # One that waited for somebody to write to a fifo would never come back.
    for path in in_the_way(tmp_path).values():
        for suffix in ("", ".pt") if use == "RegisterMeans" else ("",):
            if suffix and path.is_fifo():
                path = tmp_path / f"{path.name}.pt"
                os.mkfifo(path)
            with pytest.raises(FileError, match=path.name):
                LOADERS[use](str(path) if use == "load_model" else path)


def test_fifos_inside_of_folders(tmp_path: Path) -> None:
    bs.save_patch(bs.patch_model(models.planted("llama"), "set_zero", sites=SITES), tmp_path)
    for name in ("surgery.json", "surgery.safetensors"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileError, match=name):
            bs.load_patch(models.planted("llama"), tmp_path)
    os.mkfifo(tmp_path / "counts.json")
    with pytest.raises(FileError, match="is not a file"):
        CountFile(tmp_path / "counts.json", "key", "name", models.planted("llama")).read()


def test_links_are_followed(tmp_path: Path) -> None:
    """A snapshot of the hub is a folder of links to files of other names."""
    model = bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)
    bs.save_patch(model, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, name in enumerate(("surgery.json", "surgery.safetensors")):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / str(number))
    loaded = bs.load_patch(models.planted("llama"), tmp_path / "snapshot")
    assert bs.patches(loaded) == bs.patches(model)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was executed')",)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def long_json(path: Path) -> None:
    """200 MB of it, of which the disk holds nothing."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b'{"')
        file.truncate(200_000_010)


def negative_sizes(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def overflowing_sizes(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def deep_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch": lambda path: torch.save({0: Bomb(), "weight": Bomb()}, path),
    "old torch": lambda path: torch.save(Bomb(), path, _use_new_zipfile_serialization=False),
    "huge header": huge_header,
    "long json": long_json,
    "negative sizes": negative_sizes,
    "overflowing sizes": overflowing_sizes,
    "deep header": deep_header,
    "half a legacy pickle": lambda path: path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2)),
    "a cut string": lambda path: path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fab"),
    "stack underflow": lambda path: path.write_bytes(b"\x80\x02.........."),
    "unknown memo": lambda path: path.write_bytes(b"\x80\x02h\x07."),
    "text": lambda path: path.write_text("Four score and seven years ago"),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("use", [*FINDERS, "RegisterMeans .pt", "LinearHead", "load_patch"])
def test_hostile_contents(use: str, content: str, tmp_path: Path) -> None:
    models.planted("llama")  # what it imports is not counted
    path = tmp_path / ("surgery.safetensors" if use == "load_patch" else "file.pt")
    if use in FINDERS:
        path = tmp_path / "file.safetensors"
    HOSTILE[content](path)
    start = time.process_time()
    with pytest.raises(FileError, match=path.name):
        LOADERS[use.removesuffix(" .pt")](tmp_path if use == "load_patch" else path)
    assert time.process_time() - start < 5


def test_json_that_is_hostile(tmp_path: Path) -> None:
    """As the document of an old folder, beside a new one, and as a file of counts."""
    path = tmp_path / "surgery.json"
    model = models.planted("llama")
    for content in (b"[" * 100_000, b'{"counts": ' * 50_000, b'{"a": 1, "a": 2}', b"1" * 10_000):
        for old in (False, True):
            bs.save_patch(bs.patch_model(model, "set_zero", sites=SITES), tmp_path)
            bs.unpatch_model(model)
            if old:
                save_file({}, tmp_path / "surgery.safetensors", {"biassurgery.patch": "1"})
            path.write_bytes(content)
            with untouched(model, IDS), pytest.raises(FileError, match=r"surgery\.json"):
                bs.load_patch(model, tmp_path)
        with pytest.raises(FileError, match="counts"):
            CountFile(path, "key", "name", model).read()
    with path.open("wb") as file:
        file.truncate(10**12)
    start = time.process_time()
    with pytest.raises(FileError, match=r"surgery\.json .*larger than"):
        bs.load_patch(model, tmp_path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "entry",
    [
        {"batches": -1},
        {"batches": True},
        {"batches": 1.5},
        {"batches": 10**400},
        {"batches": None},
        {"batches": float("inf")},
        {"right": 5, "images": 4},
        [1],
        "many",
    ],
    ids=str,
)
def test_counts_that_cannot_be(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(json.dumps({"counts": {"key": entry}}))
    with pytest.raises(FileError, match="holds no counts for key"):
        CountFile(tmp_path / "counts.json", "key", "name", models.planted("llama")).read()


def header_with(finding: Any, change: Callable[[Any], Any]) -> dict[str, Any]:
    header = json.loads(json.dumps({"format": 1} | finding.header()))
    change(header)
    return header


def put(*way: Any) -> Callable[[Any], None]:
    """Set what lies at the end of a way through JSON."""
    *path, last, value = way

    def change(document: Any) -> None:
        for step in path:
            document = document[step]
        document[last] = value

    return change


WRONG = {
    "biassurgery.sites": [
        *[put("sites", 0, name, -1) for name in ("layer", "channel", "count", "cluster")],
        *[put("sites", 0, name, True) for name in ("layer", "mean", "count")],
        *[put("sites", 0, name, 10**400) for name in ("layer", "mean", "std", "margin")],
        *[put("sites", 0, name, 1e39) for name in ("mean", "std", "gate")],
        *[put("sites", 0, name, -1.0) for name in ("std", "gate", "margin")],
        *[put("sites", 0, name, "1") for name in ("layer", "mean")],
        put("sites", 0, "layer", 1.5),
        put("sites", 0, "layer", 5),  # of 5 layers
        put("sites", 0, "channel", 64),  # of 64 channels
        put("sites", 0, "mean", None),
        *[put("sites", 0, "first", value) for value in (1, "yes", [])],
        *[
            put("sites", 0, "spans", [span])
            for span in (
                ["start", 0, 1.0],
                [3, 0, 1.0, 2.0],
                ["start", -1, 1.0, 2.0],
                ["start", True, 1.0, 2.0],
                ["start", 0, None, 2.0],
                ["start", 0, 1.0, 1e39],
                ["start", 0, float("nan"), 2.0],
            )
        ],
        put("sites", {}),
        put("sites", 0, []),
        put("origin", "layers", "five"),
        put("origin", "layers", True),
        put("origin", "layers", 0),
        put("origin", "width", -64),
        put("origin", "architecture", 3),
        put("origin", "roles", "start"),
        put("origin", "roles", [1]),
        put("origin", "min_ratio", "1000"),
        put("origin", "source", None),
        put("sequences", -1),
        put("format", True),
        put("format", "1"),
    ],
    "biassurgery.key_values": [
        *[put("count", value) for value in (-1, True, 1.5, "8", None, 10**400)],
        put("architecture", None),
    ],
    "biassurgery.registers.means": [
        *[put("count", value) for value in (-1, True, 1.5, "8", None, 10**400)],
        put("architecture", 3),
    ],
    "biassurgery.registers.neurons": [
        *[put("neurons", 0, at, -1) for at in (0, 1)],
        *[put("neurons", 0, at, True) for at in (0, 1, 2)],
        put("neurons", 0, 0, 3),  # of 3 layers
        put("neurons", 0, 2, 1e39),
        put("neurons", 0, 2, 10**400),
        put("neurons", 0, [1, 2]),
        put("neurons", 5),
        put("layers", 0),
        put("images", -1),
        put("threshold", "10"),
    ],
}


@pytest.mark.parametrize(
    ("key", "number"), [(key, number) for key in WRONG for number in range(len(WRONG[key]))]
)
def test_headers_that_cannot_be(key: str, number: int, tmp_path: Path) -> None:
    """Under a checksum that is right, as a program would write them."""
    finding = FINDINGS[key]
    header = header_with(finding, WRONG[key][number])
    path = tmp_path / "bad.safetensors"
    metadata = {key: json.dumps(header)}
    tensors = finding.tensors()
    save_file(tensors, path, metadata | {CHECKSUM: checksum_of(tensors, metadata)})
    with pytest.raises(FileError, match=r"bad\.safetensors"):
        type(finding).load(path)


def test_a_header_that_says_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    for key, finding in FINDINGS.items():
        twice = json.dumps({"format": 1} | finding.header())[:-1] + ', "format": 1}'
        save_file(finding.tensors(), path, {key: twice})
        with pytest.raises(FileError, match="a name occurs twice"):
            type(finding).load(path)
    entry = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = b"{" + entry + b", " + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    with pytest.raises(FileError, match="a name occurs twice"):
        bs.Sites.load(path)


@pytest.mark.parametrize("key", ["biassurgery.key_values", "biassurgery.registers.means"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.long(),
        lambda x: x.bool(),
        lambda x: x.double(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x[..., :0],
        lambda x: x[0],
        lambda x: x[:1],
    ],
)
def test_tensors_that_cannot_be(key: str, change: Any, tmp_path: Path) -> None:
    """Of another dtype or shape, or empty."""
    for name, tensor in FINDINGS[key].tensors().items():
        wrong = FINDINGS[key].tensors() | {name: change(tensor).contiguous()}
        metadata = {key: json.dumps({"format": 1} | FINDINGS[key].header())}
        save_file(wrong, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(FileError, match=r"bad\.safetensors"):
            type(FINDINGS[key]).load(tmp_path / "bad.safetensors")


def test_deviations_below_zero() -> None:
    """They would hide that a start token is no constant."""
    for key, names in (
        ("biassurgery.key_values", ("key_std", "value_std")),
        ("biassurgery.registers.means", ("std",)),
    ):
        for name in names:
            with pytest.raises(BadOption, match=f"{name} is negative"):
                replace(FINDINGS[key], **{name: -FINDINGS[key].tensors()[name]})


def test_the_spread_of_large_numbers() -> None:
    """The square of a float32 may be infinite, and anything over infinity is 0."""
    keys = torch.full((1, 1, 2), 1e30)
    found = bs.KeyValues(keys, keys, keys / 2, keys / 4, 1, "llama")
    assert found.spread == pytest.approx(0.5)


def lengthened(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(1)])


@pytest.mark.parametrize(
    "change",
    [
        {"keys": lambda x: x.int()},
        {"keys": lambda x: x - 2**62},
        {"keys": lambda x: x + 2**40},
        {"count": lambda x: x.float()},
        {"count": lambda x: -x},
        {"deviation": lambda x: -x - 1},
        {"low": lambda x: x * 1e6},
        {"hit": lambda x: x * 0},
        {"below": lambda x: -x - 1},
        {"medians": lambda x: -x},
        {"grown": lambda x: torch.cat([x, torch.tensor([-1])]), "growth": lengthened},
        {"grown": lambda x: torch.cat([x, torch.tensor([2**50])]), "growth": lengthened},
        {"growth": lengthened},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tally_that_cannot_be(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    calibrated().save(path)
    tensors, metadata = parts(path)
    for name, of in change.items():
        tensors[name] = of(tensors[name])
    save_file(tensors, path, metadata)
    with pytest.raises(FileError, match=r"bad\.safetensors.*tally"):
        bs.Sites.load(path)


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.zeros(4, 8, dtype=torch.complex64)},
        {0: torch.zeros(4, 8).to_sparse()},
        {0: torch.zeros(4, 0)},
        {0: torch.zeros(4, 8, dtype=torch.int64)},
        {0: torch.zeros(4, 8, device="meta")},
        {True: torch.zeros(4, 8), False: torch.zeros(4, 8)},
        {0: torch.quantize_per_tensor(torch.zeros(4, 8), 1.0, 0, torch.qint8)},
    ],
    ids=["complex", "sparse", "empty", "integer", "meta", "bools", "quantised"],
)
def test_means_of_the_paper_that_cannot_be(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "means.pt")
    with pytest.raises(FileError, match=r"means\.pt"):
        bs.RegisterMeans.load(tmp_path / "means.pt")


def test_heads_that_cannot_be(tmp_path: Path) -> None:
    right = {"weight": torch.rand(3, 4), "bias": torch.rand(3)}
    path = tmp_path / "head.pth"
    torch.save(right, path)
    assert torch.equal(LinearHead.load(path).weight, right["weight"])
    for wrong in (
        {"weight": torch.full((3, 4), torch.nan)},
        {"bias": torch.full((3,), torch.inf)},
        {"weight": [1]},
        {"weight": torch.rand(4)},
    ):
        torch.save(right | wrong, path)
        with pytest.raises(FileError, match=r"head\.pth holds no linear head"):
            LinearHead.load(path)


def test_a_part_of_an_archive_that_became_a_folder(tmp_path: Path) -> None:
    """torch itself returns memory that nothing was written to, see `torch_files._checked`."""
    values = torch.rand(2, 4, 8)
    path = tmp_path / "means.pt"
    torch.save(dict(enumerate(values)), path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (part,) = [part for part in archive.namelist() if part.endswith("data/0")]
    directory = content.rindex(b"PK\x01\x02", 0, content.rindex(part.encode()))
    content[directory + 38] |= 0x10  # the external attributes
    path.write_bytes(content)
    assert torch.equal(bs.RegisterMeans.load(path).values, values)
    content[content.index(values.numpy().tobytes()[:16])] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"means\.pt .*Bad CRC"):
        bs.RegisterMeans.load(path)


def test_an_archive_without_checksums_is_said(tmp_path: Path) -> None:
    values = torch.rand(2, 4, 8)
    torch.save(dict(enumerate(values)), tmp_path / "means.pt", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"means\.pt .*no checksums"):
        assert torch.equal(bs.RegisterMeans.load(tmp_path / "means.pt").values, values)


@pytest.mark.parametrize("key", FINDINGS)
def test_a_file_without_a_checksum_is_said(key: str, tmp_path: Path) -> None:
    """One of an earlier version; saved again, it has one."""
    path = tmp_path / "old.safetensors"
    FINDINGS[key].save(path)
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata)
    loader = type(FINDINGS[key])
    with pytest.warns(UserWarning, match=r"old\.safetensors .*no checksum.*\.save\(path\)"):
        old = loader.load(path)
    old.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loader.load(path), FINDINGS[key])
