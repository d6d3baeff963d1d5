"""Register neurons as a table and as a file."""

from __future__ import annotations

import pytest

import biassurgery as bs
from biassurgery.errors import FileError
from tests.edits.plain_hooks import neurons_of, random_vit
from tests.models import (
    LAYER,
    images,
    planted_vit,
)


def test_a_printed_table():
    model = planted_vit()
    text = str(bs.find_register_neurons(model, images(3), count=2))
    assert "Register neurons" in text
    assert "at 9 outlier tokens of 3 images" in text
    assert f"block {LAYER}" in text


def test_neurons_in_a_file(tmp_path):
    neurons = neurons_of(random_vit())
    neurons.save(tmp_path / "neurons.safetensors")
    assert bs.RegisterNeurons.load(tmp_path / "neurons.safetensors") == neurons
    bs.Sites().save(tmp_path / "sites.safetensors")
    with pytest.raises(FileError, match=r"pass a file written by RegisterNeurons\.save"):
        bs.RegisterNeurons.load(tmp_path / "sites.safetensors")
    with pytest.raises(FileError, match="not a file"):
        bs.RegisterNeurons.load(tmp_path / "absent.safetensors")
