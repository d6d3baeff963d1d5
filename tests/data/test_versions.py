"""Folders that transformers 5 wrote are read right by version 4, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from biassurgery.data.loading import load_model
from biassurgery.data.versions import name_for_both
from biassurgery.errors import FileError
from tests.models import planted

OLD = int(transformers.__version__.split(".")[0]) < 5
BASE = 77.0


def written_by_5(folder: Path, model: Any, parameters: dict[str, Any]) -> None:
    """A checkpoint whose config.json has rotary positions as version 5 writes them, and only so."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        config.pop(name, None)
    file.write_text(json.dumps(config | {"rope_parameters": parameters}))


def gemma3() -> Any:
    """One block with a sliding window, one without."""
    config = transformers.Gemma3TextConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def gemma3_with_images() -> Any:
    """The same as the language model of one that reads images as well."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = gemma3().config.to_dict()
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=15
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def frequencies(folder: Path) -> list[torch.Tensor]:
    """Of the rotary positions of the loaded model."""
    model = load_model(str(folder), device="cpu").model
    return [
        tensor
        for name, tensor in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    ]


def powers(base: float, pairs: int) -> torch.Tensor:
    return base ** -(torch.arange(pairs) / pairs)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_one_base(tmp_path: Path, family: str) -> None:
    written_by_5(tmp_path, planted(family), {"rope_theta": BASE, "rope_type": "default"})
    if OLD:
        with pytest.raises(FileError, match=r"written by transformers 5.*77\.0.*load it with"):
            load_model(str(tmp_path), device="cpu")
    name_for_both(tmp_path)
    (found,) = frequencies(tmp_path)
    torch.testing.assert_close(found, powers(BASE, len(found)))


def test_scaled(tmp_path: Path) -> None:
    parameters = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}
    written_by_5(tmp_path, planted("llama"), parameters)
    if OLD:  # the base is the default one; only the scaling would be passed over
        with pytest.raises(FileError, match="linear"):
            load_model(str(tmp_path), device="cpu")
    name_for_both(tmp_path)
    (found,) = frequencies(tmp_path)
    torch.testing.assert_close(found, powers(10_000.0, len(found)) / 4)


def test_a_base_for_each_kind_of_layer(tmp_path: Path) -> None:
    kinds = {"full_attention": BASE, "sliding_attention": 33.0}
    parameters = {k: {"rope_theta": base, "rope_type": "default"} for k, base in kinds.items()}
    written_by_5(tmp_path, gemma3(), parameters)
    if OLD:
        with pytest.raises(FileError, match=r"sliding_attention"):
            load_model(str(tmp_path), device="cpu")
    name_for_both(tmp_path)
    found = {round(float(f[1] ** -len(f)), 1) for f in frequencies(tmp_path)}
    assert found == {BASE, 33.0}


def test_a_share_of_the_channels(tmp_path: Path) -> None:
    """The base is the default one; only the share of the channels would be passed over."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.PhiConfig(vocab_size=16, num_attention_heads=1, **sizes)
    parameters = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.75}
    written_by_5(tmp_path, transformers.PhiForCausalLM(config), parameters)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields.pop("partial_rotary_factor", None)
    file.write_text(json.dumps(fields))
    if OLD:
        with pytest.raises(FileError, match=r"0\.75.*\[4\] pairs of channels.*load it with"):
            load_model(str(tmp_path), device="cpu")
    name_for_both(tmp_path)
    (found,) = frequencies(tmp_path)
    torch.testing.assert_close(found, powers(10_000.0, 6))


def test_the_language_model_of_one_that_reads_images(tmp_path: Path) -> None:
    gemma3_with_images().save_pretrained(tmp_path)
    kinds = {"full_attention": BASE, "sliding_attention": 33.0}
    parameters = {k: {"rope_theta": base, "rope_type": "default"} for k, base in kinds.items()}
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        fields["text_config"].pop(name, None)
    fields["text_config"]["rope_parameters"] = parameters
    file.write_text(json.dumps(fields))
    if OLD:
        with pytest.raises(FileError, match=r"sliding_attention"):
            load_model(str(tmp_path), device="cpu")
    name_for_both(tmp_path)
    found = {round(float(f[1] ** -len(f)), 1) for f in frequencies(tmp_path)}
    assert found == {BASE, 33.0}


def test_the_old_name_of_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "é"}))
    name_for_both(tmp_path)
    fields = json.loads(file.read_text())
    assert fields == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "é"}
    file.write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    name_for_both(tmp_path)
    assert json.loads(file.read_text()) == {"tokenizer_class": "GPT2Tokenizer"}
