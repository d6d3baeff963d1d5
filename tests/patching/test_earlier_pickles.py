"""Whole patched models that earlier versions wrote with `torch.save`: they run, or are refused."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.edits.massive import MassiveEdit
from biassurgery.errors import FileError
from biassurgery.surgery.attention import EditedAttention
from tests import models
from tests.refusals import IDS, SITES
from tests.state import output_of

MODES: dict[str, dict[str, Any]] = {
    "instrument": {},
    "attention_bias": {"kind": "kv", "init": "normal"},
    "transplant": {},
    "set_zero": {"sites": SITES},
}


def written_before(model: Any, without: tuple[str, ...]) -> Any:
    """The model in a file, as versions wrote it that did not have some attributes, read again."""
    for module in model.modules():
        if isinstance(module, EditedAttention):
            for name in without:
                vars(module).pop(name, None)
        if isinstance(module, MassiveEdit) and "kept" in without:
            module._buffers.pop("kept")
            module._non_persistent_buffers_set.discard("kept")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("without", [("attention_reads",), ("attention_reads", "host_reads")])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_what_modules_are_lent_now_runs(mode: str, without: Any) -> None:
    model = models.planted("llama")
    plain = output_of(model, IDS)
    options = dict(MODES[mode])
    if mode == "transplant":
        options["key_values"] = bs.calibrate_key_values(model, IDS)
    torch.manual_seed(0)
    bs.patch_model(model, mode, **options)
    patched = output_of(model, IDS)
    read = written_before(model, (*without, "kept"))
    assert torch.equal(output_of(read, IDS), patched)
    assert [patch.mode.name for patch in bs.patches(read)] == [mode]
    if mode != "instrument":
        assert not torch.equal(patched, plain)
    bs.unpatch_model(read)
    assert torch.equal(output_of(read, IDS), plain)
    left = {name for module in read.modules() for name in vars(module)}
    assert left.isdisjoint({"attention_reads", "host_reads", "host_config", "core_config"})


def test_a_model_of_the_time_before_the_rooms_is_refused_with_what_to_do() -> None:
    beginning = b"cbiassurgery.swapping\n_new_swapped\n."
    for read in (pickle.loads, lambda data: pickle.Unpickler(io.BytesIO(data)).load()):
        with pytest.raises(FileError, match=r"earlier version.*save_patch.*load_patch"):
            read(beginning)
    with pytest.raises(AttributeError, match="anything"):
        pickle.loads(b"cbiassurgery.swapping\nanything\n.")
