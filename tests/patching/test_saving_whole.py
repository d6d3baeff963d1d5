"""A folder of patches holds the old patch or the new one, whole, whatever happens while it is
saved; and what it holds is of one save.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import biassurgery as bs
from biassurgery.errors import FileError
from tests import models
from tests.refusals import IDS, SITES
from tests.state import bits, output_of, untouched
from tests.surgery.faults import PACKAGE, Broken, Interrupted, count_calls, fault

Files = dict[str, bytes]
JSON = "surgery.json"
TENSORS = "surgery.safetensors"


def biased(seed: int) -> Any:
    """A model with a bias whose numbers depend on the seed, and nothing else of its patch."""
    torch.manual_seed(seed)
    return bs.patch_model(models.planted("llama"), "attention_bias", kind="kv", std=1.0)


def zeroed() -> Any:
    return bs.patch_model(models.planted("llama"), "set_zero", sites=SITES)


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def put(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def loaded(folder: Path) -> Any:
    """The output of a model with the patch of a folder on it."""
    model = bs.load_patch(models.planted("llama"), folder)
    return bits(output_of(model, IDS))


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, dict[str, Any], Any]:
    """A folder with an old patch, the outputs under the old and the new one, the new model."""
    old = zeroed()
    bs.save_patch(old, tmp_path / "patch")
    new = biased(1)
    outputs = {"old": bits(output_of(old, IDS)), "new": bits(output_of(new, IDS))}
    assert outputs["old"] != outputs["new"]
    return tmp_path / "patch", outputs, new


@contextmanager
def watched(folder: Path) -> Iterator[list[Files]]:
    """What lies in a folder at each line that the library runs: what a kill there would leave."""
    states: list[Files] = []

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        found = files_of(folder)
        if not states or states[-1] != found:
            states.append(found)
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    tracing = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield states
    finally:
        sys.settrace(tracing)


def test_killed_at_any_line(old_and_new: Any, tmp_path: Path) -> None:
    folder, outputs, new = old_and_new
    before = files_of(folder)
    with watched(folder) as states:
        bs.save_patch(new, folder)
    after = files_of(folder)
    assert set(after) == {JSON, TENSORS}
    torn = {TENSORS: after[TENSORS], JSON: before[JSON]}
    named = [{name: state[name] for name in (TENSORS, JSON)} for state in states]
    assert named[0] == before
    assert torn in named
    assert after in named
    found = []
    for state in states:
        put(tmp_path / "left", state)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(next(n for n, o in outputs.items() if o == loaded(tmp_path / "left")))
        named_state = {name: state[name] for name in (TENSORS, JSON)}
        assert any("of another save" in str(w.message) for w in said) == (named_state == torn)
    assert found == sorted(found, reverse=True)  # once it is the new one, it stays that
    assert set(found) == {"old", "new"}


def test_killed_at_any_line_of_a_first_save(tmp_path: Path) -> None:
    new = biased(1)
    (tmp_path / "patch").mkdir()
    with watched(tmp_path / "patch") as states:
        bs.save_patch(new, tmp_path / "patch")
    results = []
    for state in states:
        put(tmp_path / "left", state)
        try:
            results.append(loaded(tmp_path / "left") == bits(output_of(new, IDS)))
        except FileError:
            results.append(None)
    assert results[0] is None
    assert results[-1] is True
    assert False not in results


@pytest.mark.parametrize("error", [Broken, Interrupted])
def test_a_fault_at_any_call(old_and_new: Any, error: type[BaseException]) -> None:
    folder, outputs, new = old_and_new
    before = files_of(folder)
    calls = count_calls(lambda: bs.save_patch(new, folder))
    after = files_of(folder)
    found = set()
    for at in range(calls, 0, -max(1, calls // 80)):
        put(folder, before)
        with fault(at, error), pytest.raises(error):
            bs.save_patch(new, folder)
        assert set(files_of(folder)) == {JSON, TENSORS}, at  # no half-written file is left
        found.add(files_of(folder)[TENSORS] == after[TENSORS])
        if files_of(folder) not in (before, after):
            assert loaded(folder) == outputs["new"], at
    assert False in found


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(old_and_new: Any) -> None:
    folder, outputs, new = old_and_new
    before = files_of(folder)
    bs.save_patch(new, folder)
    sizes = {name: len(content) for name, content in files_of(folder).items()}
    put(folder, before)
    for size in (0, 1, sizes[JSON] - 1, sizes[TENSORS] // 2, sizes[TENSORS] - 1):
        with room(size), pytest.raises(FileError, match="cannot write"):
            bs.save_patch(new, folder)
        assert files_of(folder) == before, size
    assert loaded(folder) == outputs["old"]
    with room(max(sizes.values())):
        bs.save_patch(new, folder)
    assert loaded(folder) == outputs["new"]


def test_a_folder_in_the_way_of_either_file(tmp_path: Path) -> None:
    for name in (JSON, TENSORS):
        folder = tmp_path / name
        (folder / name / "sub").mkdir(parents=True)
        with pytest.raises(FileError, match=name):
            bs.save_patch(zeroed(), folder)
        assert [path.name for path in folder.iterdir()] == [name]


def test_both_files_say_the_same(tmp_path: Path) -> None:
    """A patch without tensors of its own has both files, too."""
    for name, model in (("zero", zeroed()), ("bias", biased(1))):
        bs.save_patch(model, tmp_path / name)
        with safe_open(tmp_path / name / TENSORS, framework="pt") as file:
            metadata = file.metadata()
            assert len(list(file.keys())) == (0 if name == "zero" else 3 * models.LAYERS)
        document = json.loads((tmp_path / name / JSON).read_text())
        assert document.pop("sha256") == metadata["biassurgery.sha256"]
        assert document == json.loads(metadata["biassurgery.patch"])
        assert set(document) == {"format", "written_with", "patches"}
        (tmp_path / name / JSON).unlink()  # the tensors hold the whole patch
        assert loaded(tmp_path / name) == bits(output_of(model, IDS))


def test_tensors_of_another_patch_are_that_patch(tmp_path: Path) -> None:
    """They never load under a document that is not theirs, though all shapes agree."""
    for seed in (1, 2):
        bs.save_patch(biased(seed), tmp_path / str(seed))
    documents = [json.loads((tmp_path / str(seed) / JSON).read_text()) for seed in (1, 2)]
    assert documents[0]["sha256"] != documents[1]["sha256"]
    assert documents[0]["patches"] == documents[1]["patches"]
    shutil.copy(tmp_path / "2" / TENSORS, tmp_path / "1" / TENSORS)
    with pytest.warns(UserWarning, match=r"surgery\.json is of another save"):
        assert loaded(tmp_path / "1") == bits(output_of(biased(2), IDS))
    bs.save_patch(zeroed(), tmp_path / "1")
    shutil.copy(tmp_path / "2" / TENSORS, tmp_path / "1" / TENSORS)
    with pytest.warns(UserWarning, match=r"surgery\.json is of another save"):
        assert loaded(tmp_path / "1") == bits(output_of(biased(2), IDS))


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document["patches"][0].update(layers=[1]),
        lambda document: document["patches"][0]["options"].update(kind="k"),
        lambda document: document.update(patches=[]),
        lambda document: document["written_with"].update(torch="1.0"),
    ],
)
def test_an_edited_document_is_refused(edit: Any, tmp_path: Path) -> None:
    """Whoever edited it expects to have changed the patch."""
    bs.save_patch(biased(1), tmp_path)
    document = json.loads((tmp_path / JSON).read_text())
    edit(document)
    (tmp_path / JSON).write_text(json.dumps(document))
    model = models.planted("llama")
    with (
        untouched(model, IDS),
        pytest.raises(FileError, match=r"surgery\.json was changed .* Delete it"),
    ):
        bs.load_patch(model, tmp_path)
    bs.save_patch(biased(1), tmp_path)
    text = (tmp_path / JSON).read_text()
    (tmp_path / JSON).write_text(json.dumps(json.loads(text)))  # another layout says the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(tmp_path) == bits(output_of(biased(1), IDS))


def strip(folder: Path, metadata: dict[str, str] | None) -> None:
    """Write the tensors of a folder again, under other metadata."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / TENSORS, metadata)


def as_version_0_2_0(folder: Path) -> None:
    """Rewrite a folder as that version wrote it: the document in surgery.json alone."""
    strip(folder, {"biassurgery.patch": "1"})
    document = json.loads((folder / JSON).read_text())
    del document["sha256"]
    (folder / JSON).write_text(json.dumps(document, indent=1) + "\n")


@pytest.mark.parametrize("make", [zeroed, lambda: biased(1)], ids=["zero", "bias"])
def test_a_folder_of_version_0_2_0(make: Any, tmp_path: Path) -> None:
    """It loads, with a note of what is not checked; saved again, it is one of today."""
    expected = bits(output_of(make(), IDS))
    bs.save_patch(make(), tmp_path)
    as_version_0_2_0(tmp_path)
    model = models.planted("llama")
    with pytest.warns(UserWarning, match=r"an earlier version.*save_patch\(model") as said:
        bs.load_patch(model, tmp_path)
    assert [warning.filename for warning in said] == [__file__]
    assert bits(output_of(model, IDS)) == expected
    bs.save_patch(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(tmp_path) == expected


def test_old_tensors_under_a_new_document(tmp_path: Path) -> None:
    bs.save_patch(biased(1), tmp_path / "old")
    as_version_0_2_0(tmp_path / "old")
    bs.save_patch(biased(2), tmp_path / "new")
    shutil.copy(tmp_path / "new" / JSON, tmp_path / "old" / JSON)
    with pytest.raises(FileError, match=r"surgery\.json is not of the patch in"):
        loaded(tmp_path / "old")
    shutil.copy(tmp_path / "new" / TENSORS, tmp_path / "old" / TENSORS)
    strip(tmp_path / "old", None)  # some program has lost the metadata: both are still of one patch
    assert loaded(tmp_path / "old") == bits(output_of(biased(2), IDS))
