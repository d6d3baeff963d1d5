"""transformers' Trainer on patched models: trained, evaluated, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import biassurgery as bs
from tests.integrations.test_pipeline import patch
from tests.models import planted, tokens
from tests.state import fingerprint, output_of

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:  # versions of libraries that do not go together
    pytest.skip(f"Trainer cannot be imported here: {error}", allow_module_level=True)

IDS = tokens(8, 16)
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
BIASES = ("k_bias", "v_bias")


def trainer(model: Any, folder: Path, steps: int = 4, **options: Any) -> Trainer:
    """Four steps, a checkpoint after each second one."""
    how = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model, how, train_dataset=ROWS, eval_dataset=ROWS)  # type: ignore[arg-type]


def loss(model: Any) -> float:
    """The mean over the evaluation's batches of 3, 3 and 2 rows, weighted by rows."""
    logits = output_of(model, IDS).double()
    rows = [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, IDS)]
    return float(torch.stack(rows).mean())


def scale(folder: Path) -> float:
    """What Trainer makes of that mean, of a stock model: version 4 divides by the first tokens too,
    which nothing predicts.
    """
    stock = planted("llama")
    found = trainer(stock, folder).evaluate()["eval_loss"] / loss(stock)
    assert found == pytest.approx(1 if transformers.__version__ >= "5" else 15 / 16, rel=1e-5)
    return found


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("mode", ["set_zero", "pin"])
def test_modes_without_parameters(mode: str, tmp_path: Path) -> None:
    """The stock model's keys are trained and saved; off again, it is a stock model with them."""
    model = patch(planted("llama"), mode)
    before = weights(model)
    first = trainer(model, tmp_path)
    said = scale(tmp_path / "stock")
    assert first.evaluate()["eval_loss"] == pytest.approx(said * loss(model), rel=1e-5)
    assert abs(loss(model) - loss(planted("llama"))) > 1e-3
    first.train()
    trained = weights(model)
    assert list(trained) == list(before) == list(planted("llama").state_dict())
    assert any(not trained[name].equal(before[name]) for name in trained)
    assert first.evaluate()["eval_loss"] == pytest.approx(said * loss(model), rel=1e-5)
    with_patch = loss(model)
    bs.unpatch_model(model)
    stock = type(planted("llama")).from_pretrained(tmp_path / "checkpoint-4").eval()
    assert torch.equal(output_of(model.eval(), IDS), output_of(stock, IDS))
    assert abs(loss(stock) - with_patch) > 1e-3
    assert loss(patch(stock, mode)) == with_patch


@pytest.mark.parametrize(
    "mode", [pytest.param("set_zero", marks=pytest.mark.long), "attention_bias"]
)
def test_resuming(mode: str, tmp_path: Path) -> None:
    """Killed after two steps of four and gone on with in a new model: the same bits."""
    whole = patch(planted("llama"), mode)
    trainer(whole, tmp_path / "whole").train()
    trainer(patch(planted("llama"), mode), tmp_path / "half", steps=2).train()
    resumed = patch(planted("llama"), mode)
    start = weights(resumed)
    trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(whole))
    assert any(not start[name].equal(tensor) for name, tensor in weights(whole).items())


def test_biases_alone(tmp_path: Path) -> None:
    """They are all that is trained, and are saved as keys of their own; undone bit by bit."""
    model = planted("llama")
    untrained = fingerprint(model)
    torch.manual_seed(3)
    bs.patch_model(model, "attention_bias", kind="kv", std=1.0, trainable="bias")
    before, ahead = weights(model), loss(model)
    made = trainer(model, tmp_path, steps=8)
    made.train()
    model.eval()
    changed = {name for name in before if not before[name].equal(weights(model)[name])}
    assert changed == {name for name in before if name.endswith(BIASES)} != set()
    assert loss(model) < ahead - 1e-2
    said = scale(tmp_path / "stock")
    assert made.evaluate()["eval_loss"] == pytest.approx(said * loss(model), rel=1e-5)
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    added = set(model.state_dict()) - set(planted("llama").state_dict())
    assert changed <= added <= set(saved)  # and a logit that eq. 3 leaves at 0
    assert all(saved[name].equal(model.state_dict()[name]) for name in added)
    model.zero_grad()
    bs.unpatch_model(model)
    after = fingerprint(model)
    del untrained[":attributes"], after[":attributes"]  # Trainer leaves one on every model
    assert after == untrained
    assert torch.equal(output_of(model, IDS), output_of(planted("llama"), IDS))


def test_steps_that_are_accumulated_are_scaled_as_without_a_patch(tmp_path: Path) -> None:
    """Trainer reads in the signature of `forward` whether the model divides by the tokens of a
    whole step; a patch on the model itself must not change what it finds.
    """
    options = {"gradient_accumulation_steps": 2}
    stock = planted("llama")
    trainer(stock, tmp_path / "stock", steps=2, **options).train()
    patched = planted("llama")
    site = bs.Site(1, 7, "start", -2000.0, gate=1e9)
    bs.patch_model(patched, "set_zero", sites=bs.Sites([site]))  # beyond its gate is nothing
    trainer(patched, tmp_path / "patched", steps=2, **options).train()
    assert_same(weights(patched), weights(stock))
    watched = patch(planted("llama"), "transplant")
    assert trainer(watched, tmp_path).model_accepts_loss_kwargs is (
        trainer(planted("llama"), tmp_path).model_accepts_loss_kwargs
    )
