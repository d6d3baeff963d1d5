"""Patches on attention in files: in a checkpoint of the whole model, in a folder of their own, on
the hub.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import biassurgery as bs
from biassurgery.errors import FileError, Incompatible, NotPatched
from biassurgery.modes import Transplant
from tests.models import LAYERS, planted, tokens
from tests.state import bits, output_of, untouched

KINDS = ("kv", "k", "v", "sink_logit", "off_by_one", "gate")


def biased(kind: str = "kv", seed: int = 3, family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(seed)
    return bs.patch_model(
        planted(family),
        "attention_bias",
        kind=kind,
        **({} if kind == "off_by_one" else {"std": 1.0}),
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_patched_model(kind: str, tmp_path: Path) -> None:
    """It holds the added parameters, and loads into a model that was patched afresh; its own
    weights load into any.
    """
    model = biased(kind)
    ids = tokens()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    added = {name for name in model.state_dict() if f"attention_bias_{kind}" in name}
    assert len(added) == {"kv": 3, "k": 2}.get(kind, 1) * LAYERS
    assert added <= set(stored)
    fresh = biased(kind, seed=4)
    assert kind == "off_by_one" or not torch.equal(output_of(fresh, ids), output_of(model, ids))
    fresh.load_state_dict(
        {name: stored.get(name, tensor) for name, tensor in fresh.state_dict().items()}, strict=True
    )  # tied heads
    assert torch.equal(output_of(fresh, ids), output_of(model, ids))
    bare = type(planted("llama")).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(bare, ids), output_of(planted("llama"), ids))
    bs.save_patch(model, tmp_path / "patch")
    assert torch.equal(
        output_of(bs.load_patch(bare, tmp_path / "patch"), ids), output_of(model, ids)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_patch_of_low_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = biased(kind).to(dtype)
    bs.save_patch(model, tmp_path)
    again = bs.load_patch(planted("llama", dtype), tmp_path)
    assert [(name, bits(t)) for name, t in again.state_dict().items()] == [
        (name, bits(t)) for name, t in model.state_dict().items()
    ]
    assert torch.equal(output_of(again, tokens()), output_of(model, tokens()))


def test_trained_values_are_saved(tmp_path: Path) -> None:
    """What is loaded is where the training ended, as trainable as it was, and training goes on from
    there.
    """
    ids = tokens()
    model = biased("kv", trainable="bias")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    start = output_of(model, ids)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(output_of(model, ids), start)
    bs.save_patch(model, tmp_path)
    again = bs.load_patch(planted("llama"), tmp_path)
    assert torch.equal(output_of(again, ids), output_of(model, ids))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    again(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())


def test_several_patches_on_some_layers(tmp_path: Path) -> None:
    """Two kinds, one of them on two layers, and one on activations, come back in their order."""
    ids = tokens()
    model = biased("kv", layers=[1, 3])
    bs.patch_model(model, "set_value", value=5.0, channels=3, positions=2, layers=1)
    torch.manual_seed(5)
    bs.patch_model(model, "attention_bias", kind="gate", std=1.0)
    bs.save_patch(model, tmp_path)
    again = bs.load_patch(planted("llama"), tmp_path)
    assert torch.equal(output_of(again, ids), output_of(model, ids))
    assert [(p.mode, p.layers) for p in bs.patches(again)] == [
        (p.mode, p.layers) for p in bs.patches(model)
    ]
    assert [p.layers for p in bs.patches(again)] == [(1, 3), (1,), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon_alibi", "mpt"])
def test_transplant(family: str, tmp_path: Path) -> None:
    """The folder alone gives a new model the start token's key and value; key values from a file do
    the same.
    """
    ids = tokens()
    key_values = bs.calibrate_key_values(planted(family), tokens(seed=4))
    model = bs.patch_model(planted(family), "transplant", key_values=key_values)
    bs.save_patch(model, tmp_path / "patch")
    again = bs.load_patch(planted(family), tmp_path / "patch")
    assert torch.equal(output_of(again, ids[:, 1:]), output_of(model, ids[:, 1:]))
    assert (
        output_of(again, ids[:, 1:]) - output_of(planted(family), ids)[:, 1:]
    ).abs().max() < 1e-4
    key_values.save(tmp_path / "kv.safetensors")
    third = bs.patch_model(
        planted(family), "transplant", key_values=bs.KeyValues.load(tmp_path / "kv.safetensors")
    )
    assert torch.equal(output_of(third, ids[:, 1:]), output_of(model, ids[:, 1:]))


def test_a_transplant_keeps_its_spread(tmp_path: Path) -> None:
    """A start token that is no constant is said again where the patch is loaded."""
    found = bs.calibrate_key_values(planted("llama"), tokens(seed=4))
    key_values = replace(found, key_std=found.keys.abs() / 2)
    with pytest.warns(UserWarning, match="not a constant"):
        model = bs.patch_model(planted("llama"), "transplant", key_values=key_values)
    bs.save_patch(model, tmp_path)
    with pytest.warns(UserWarning, match="not a constant"):
        again = bs.load_patch(planted("llama"), tmp_path)
    (mode,) = [patch.mode for patch in bs.patches(again)]
    assert isinstance(mode, Transplant)
    assert mode.key_values.header() == key_values.header()
    for name, tensor in key_values.tensors().items():
        assert torch.equal(mode.key_values.tensors()[name], tensor)


def test_a_folder_for_another_model_is_refused(tmp_path: Path) -> None:
    bs.save_patch(biased("kv"), tmp_path)
    mistral = planted("mistral")
    with untouched(mistral, tokens()), pytest.raises(Incompatible, match="architecture"):
        bs.load_patch(mistral, tmp_path)
    there = biased("kv")
    with untouched(there, tokens()), pytest.raises(bs.AlreadyPatched):
        bs.load_patch(there, tmp_path)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """Layers and width agree, the number of key-value heads does not; nothing stays on the
    model.
    """
    import transformers

    bs.save_patch(biased("kv"), tmp_path)
    config = planted("llama").config.to_dict() | {"num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with untouched(model, tokens()), pytest.raises(FileError, match="k_bias"):
        bs.load_patch(model, tmp_path)


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`push_to_hub` uploads the folder that `load_patch` downloads; the hub itself is played by a
    folder.
    """
    import shutil

    model = biased("kv")
    ids = tokens()
    asked = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            asked["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked["repo"] = (repo_id, options)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}: {commit_message}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, **_: str(tmp_path / repo_id)
    )
    monkeypatch.chdir(tmp_path)
    assert (
        bs.push_to_hub(model, "someone/a.patch", private=True, token="t", commit_message="m")
        == "https://hub/someone/a.patch: m"
    )
    assert asked == {"token": "t", "repo": ("someone/a.patch", {"private": True, "exist_ok": True})}
    monkeypatch.chdir("/")
    assert torch.equal(
        output_of(bs.load_patch(planted("llama"), "someone/a.patch"), ids), output_of(model, ids)
    )
    with pytest.raises(NotPatched):
        bs.push_to_hub(planted("llama"), "someone/b")


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def missing(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    model: nn.Module = planted("llama")
    with untouched(model), pytest.raises(FileError, match="no such repository"):
        bs.load_patch(model, "nobody/nothing")
