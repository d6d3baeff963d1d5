"""One writer and one reader of findings: what version 0.1.0 wrote, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.errors import BadOption, FileError, Incompatible
from biassurgery.findings.finding import check_adds_up, check_finite, check_fits
from biassurgery.findings.register_neurons import RegisterNeuron
from tests.findings.hand_made import calibrated

KEYS = torch.arange(24.0).reshape(3, 2, 4)
FINDINGS: dict[str, Any] = {
    "biassurgery.sites": bs.Sites(
        [bs.Site(1, 7, "start", 3000.0, margin=math.inf)], origin=bs.Origin("llama", 5, 64)
    ),
    "biassurgery.key_values": bs.KeyValues(KEYS, KEYS + 1, KEYS + 2, KEYS + 3, 8, "llama"),
    "biassurgery.registers.means": bs.RegisterMeans(KEYS, KEYS + 1, KEYS[:, 0].clone(), 8, "vit"),
    "biassurgery.registers.neurons": bs.RegisterNeurons(
        (RegisterNeuron(1, 5, 2.5),), "vit", 3, 8, 2, 10.0, 4, 9
    ),
}
BROKEN = {
    "not json": "{",
    "an array": "[1]",
    "a string": '"1"',
    "null": "null",
    "empty": "",
    "no format": "{}",
    "nothing but a format": '{"format": 1}',
    "infinite counts": '{"format": 1, "count": Infinity, "architecture": "vit", "neurons": [[1]]}',
    "deep": "[" * 100_000,
}


def same(a: Any, b: Any) -> bool:
    return (
        type(a) is type(b)
        and a.header() == b.header()
        and a.tensors().keys() == b.tensors().keys()
        and all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())
    )


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file, without its checksum: as an older version wrote it."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        metadata = file.metadata()
        del metadata["biassurgery.sha256"]
        return {name: file.get_tensor(name) for name in names}, metadata


@pytest.mark.parametrize("key", FINDINGS)
def test_a_file_gives_back_the_finding(key, tmp_path):
    path = tmp_path / "new" / "finding.safetensors"
    FINDINGS[key].save(path)
    assert same(type(FINDINGS[key]).load(path), FINDINGS[key])
    tensors, metadata = parts(path)
    assert list(metadata) == [key]
    assert json.loads(metadata[key]) == {"format": 1} | json.loads(
        json.dumps(FINDINGS[key].header())
    )
    assert set(tensors) == set(FINDINGS[key].tensors())


@pytest.mark.parametrize(
    ("key", "architecture"),
    [("biassurgery.key_values", "llama"), ("biassurgery.registers.means", "vit")],
)
def test_what_version_0_1_0_wrote(key, architecture, tmp_path):
    """The format number alone, the rest beside it as text; sites and neurons were as they are."""
    finding = FINDINGS[key]
    metadata = {key: "1", "count": "8", "architecture": architecture}
    save_file(finding.tensors(), tmp_path / "old.safetensors", metadata)
    assert same(type(finding).load(tmp_path / "old.safetensors"), finding)
    save_file(finding.tensors(), tmp_path / "newer.safetensors", metadata | {key: "2"})
    with pytest.raises(FileError, match=r"newer\.safetensors .*format 2, .*reads 1; update"):
        type(finding).load(tmp_path / "newer.safetensors")


def test_means_of_version_0_1_0_that_tell_nothing(tmp_path):
    metadata = {"biassurgery.registers.means": "1", "count": "0"}
    save_file({"values": KEYS}, tmp_path / "old.safetensors", metadata)
    found = bs.RegisterMeans.load(tmp_path / "old.safetensors")
    assert (found.count, found.architecture, found.std, found.cls) == (0, None, None, None)


@pytest.mark.parametrize("key", FINDINGS)
@pytest.mark.parametrize("other", FINDINGS)
def test_a_finding_of_another_kind(key, other, tmp_path):
    path = tmp_path / "finding.safetensors"
    FINDINGS[other].save(path)
    if key != other:
        with pytest.raises(FileError, match=rf"finding\.safetensors holds {other}, not .*save"):
            type(FINDINGS[key]).load(path)


@pytest.mark.parametrize("key", FINDINGS)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_header_that_is_broken(key, broken, tmp_path):
    path = tmp_path / "finding.safetensors"
    save_file(FINDINGS[key].tensors() or {"none": KEYS}, path, {key: BROKEN[broken]})
    with pytest.raises(FileError, match=r"path: .*finding\.safetensors"):
        type(FINDINGS[key]).load(path)


@pytest.mark.parametrize("key", FINDINGS)
def test_a_newer_format(key, tmp_path):
    path = tmp_path / "finding.safetensors"
    header = FINDINGS[key].header() | {"format": 2}
    save_file(FINDINGS[key].tensors() or {"none": KEYS}, path, {key: json.dumps(header)})
    with pytest.raises(FileError, match="format 2, this version reads 1; update biassurgery"):
        type(FINDINGS[key]).load(path)


WORST = KEYS.clone()
WORST[1, 1, 2] = math.nan


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *[("biassurgery.key_values", name) for name in ("keys", "values", "key_std", "value_std")],
        *[("biassurgery.registers.means", name) for name in ("values", "std")],
    ],
)
def test_tensors_that_are_not_finite(key, name, tmp_path):
    finding = FINDINGS[key]
    for worst in (WORST, WORST.nan_to_num(math.inf)):
        with pytest.raises(BadOption, match=f"{name} is not finite.*calibrate_"):
            replace(finding, **{name: worst})
        save_file(
            finding.tensors() | {name: worst},
            tmp_path / "bad.safetensors",
            {key: json.dumps({"format": 1} | finding.header())},
        )
        with pytest.raises(FileError, match=rf"bad\.safetensors.*{name} is not finite"):
            type(finding).load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["mean", "std", "gate"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sites_that_are_not_finite(name, value, tmp_path):
    site = replace(FINDINGS["biassurgery.sites"][0], **{name: value})
    with pytest.raises(BadOption, match=rf"Site\(layer=1.*{name} is not finite"):
        bs.Sites([site])
    header = FINDINGS["biassurgery.sites"].header()
    header["sites"][0][name] = value
    save_file(
        {"none": KEYS},
        tmp_path / "bad.safetensors",
        {"biassurgery.sites": json.dumps(header | {"format": 1})},
    )
    with pytest.raises(FileError, match=rf"bad\.safetensors.*{name} is not finite"):
        bs.Sites.load(tmp_path / "bad.safetensors")


def test_neurons_and_published_means_that_are_not_finite(tmp_path):
    neurons = FINDINGS["biassurgery.registers.neurons"]
    with pytest.raises(BadOption, match=r"neuron=5.*is not finite"):
        replace(neurons, neurons=(RegisterNeuron(1, 5, math.nan),))
    with pytest.raises(BadOption, match="threshold is not finite"):
        replace(neurons, threshold=math.inf)
    torch.save({0: torch.full((4, 8), math.nan)}, tmp_path / "means.pt")
    with pytest.raises(FileError, match=r"means\.pt .*values is not finite"):
        bs.RegisterMeans.load(tmp_path / "means.pt")


def test_shapes_that_do_not_go_together():
    for key, name in (("key_values", "key_std"), ("key_values", "values"), ("means", "std")):
        finding = FINDINGS[
            "biassurgery.registers.means" if key == "means" else f"biassurgery.{key}"
        ]
        with pytest.raises(BadOption, match=rf"{key}: .*\(2, 2, 4\)"):
            replace(finding, **{name: KEYS[:2]})


@pytest.mark.parametrize("name", [None, 3, ["start"]])
def test_a_role_that_is_no_name(name, tmp_path):
    with pytest.raises(BadOption, match=r"role: .*; give a name"):
        bs.Site(1, 7, name, 3000.0)
    header = FINDINGS["biassurgery.sites"].header() | {"format": 1}
    header["sites"][0]["role"] = name
    save_file(
        {"none": KEYS}, tmp_path / "bad.safetensors", {"biassurgery.sites": json.dumps(header)}
    )
    with pytest.raises(FileError, match=r"bad\.safetensors.*role: "):
        bs.Sites.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["threshold", "layers", "images"])
def test_neurons_without_a_number(name, tmp_path):
    header = FINDINGS["biassurgery.registers.neurons"].header() | {"format": 1, name: None}
    metadata = {"biassurgery.registers.neurons": json.dumps(header)}
    save_file({"none": KEYS}, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(FileError, match=rf"bad\.safetensors.*{name}: None"):
        bs.RegisterNeurons.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["keys", "count", "mean", "hit", "below", "medians"])
@pytest.mark.parametrize("change", [lambda x: x[None], lambda x: x[:-1], lambda x: x[:0]])
def test_a_tally_whose_tensors_do_not_go_together(name, change, tmp_path):
    sites = calibrated()
    path = tmp_path / "bad.safetensors"
    sites.save(path)
    tensors, metadata = parts(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata)
    with pytest.raises(FileError, match=r"bad\.safetensors.*do not go together"):
        bs.Sites.load(path)


def test_the_checks_name_what_differs():
    check_finite("x", {"a": 1.0, "b": None, "c": torch.ones(2)}, "measure again")
    with pytest.raises(BadOption, match=r"x: c is not finite .*; measure again"):
        check_finite("x", {"a": 1.0, "c": torch.tensor([1.0, math.nan])}, "measure again")
    check_fits("x", {"layers": None, "width": 3}, {"layers": 4, "width": 3}, "measure again")
    with pytest.raises(
        Incompatible, match=r"x: .*number of layers is 5, this one's is 4; measure again"
    ):
        check_fits("x", {"layers": 5}, {"layers": 4}, "measure again")
    check_adds_up("x", {"width": None}, {"width": None}, "add others")
    with pytest.raises(Incompatible, match=r"x: width is None .* 3 on the right; add others"):
        check_adds_up("x", {"width": None}, {"width": 3}, "add others")
