"""The distillation example on the demo model: what is trained, what it goes on from, its end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import biassurgery as bs
from biassurgery.cli.demo import load_demo_model
from biassurgery.errors import MissingPackage

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from distill_sinks import Config, distill, divergence  # noqa: E402
from distilled import evaluate, sliding  # noqa: E402
from plot_distill_sinks import curve, read_run, rows_of  # noqa: E402

START = 1
IDS = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("demo")
    model, tokenizer = load_demo_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    start = tokenizer.convert_ids_to_tokens(START)
    return Config(str(folder), start, steps=5, rows=2, length=16, every=2, evaluated=4)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["trained"]


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("sink_logit", 0), pytest.param("kv", 0, marks=pytest.mark.long), ("sink_logit", 2)],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    kind: str, lora: int, config: Config, tmp_path: Path
) -> None:
    if lora:
        pytest.importorskip("peft")
    config = replace(config, kind=kind, lora=lora)
    distill(config, tmp_path / "whole")
    begun = trained(tmp_path / "whole")
    distill(config, tmp_path / "stopped", stop_at=3)  # one step after the state of step 2
    assert not (tmp_path / "stopped" / "patch").exists()
    assert any(not torch.equal(x, begun[name]) for name, x in trained(tmp_path / "stopped").items())
    distill(config, tmp_path / "stopped")
    end = trained(tmp_path / "stopped")
    assert end.keys() == begun.keys()
    assert all(torch.equal(end[name], begun[name]) for name in end)
    suffixes = {"sink_logit": ("sink_logit",), "kv": ("k_bias", "v_bias")}[kind]
    assert all(name.endswith(suffixes) or "lora_" in name for name in end)
    assert any("lora_" in name for name in end) == bool(lora)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [0, 2, 4, 5]


def test_what_is_written_is_what_was_trained(config: Config, tmp_path: Path) -> None:
    student = distill(replace(config, steps=2), tmp_path)
    with torch.no_grad():
        wanted = student(IDS).logits
        plain: Any = AutoModelForCausalLM.from_pretrained(config.model)
        assert (plain(IDS).logits - wanted).abs().max() > 0.1
        torch.testing.assert_close(bs.load_patch(plain, tmp_path / "patch")(IDS).logits, wanted)
        if (tmp_path / "stock").exists():
            stock = AutoModelForCausalLM.from_pretrained(
                tmp_path / "stock", attn_implementation="eager"
            )
            torch.testing.assert_close(stock(IDS).logits, wanted, rtol=1e-3, atol=1e-3)
            weights = load_file(tmp_path / "stock" / "model.safetensors")
            assert sum(name.endswith(".sinks") for name in weights) == len(plain.model.layers)
        else:
            with pytest.raises(MissingPackage):
                bs.export(student, tmp_path / "stock", format="sinks")
    with pytest.raises(SystemExit, match="another"):
        distill(config, tmp_path)


def test_the_divergence_is_that_of_the_distributions() -> None:
    model, _ = load_demo_model()
    other, _ = load_demo_model()
    bs.patch_model(other, "attention_bias", kind="kv", init="normal", std=1.0)
    with torch.no_grad():
        found = divergence(model, other, IDS, START)
        whole = torch.cat([torch.full((3, 1), START), IDS], 1)
        p = model(whole).logits[:, 1:].double().softmax(-1)
        q = other(IDS).logits.double().softmax(-1)
    wanted = (p * (p.log() - q.log())).sum(-1).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert wanted > 0.01


def test_eviction_is_a_window_that_moves_on() -> None:
    """Against every token predicted from its own window alone, with a layer of one block."""
    model, _ = load_demo_model()
    model.model.layers = model.model.layers[:1]  # deeper layers would see beyond it through others
    window = IDS.shape[1] // 4
    losses = []
    with torch.no_grad():
        for at in range(window, IDS.shape[1] - 1):
            logits = model(IDS[:, at + 1 - window : at + 1]).logits[:, -1]
            losses.append(torch.nn.functional.cross_entropy(logits, IDS[:, at + 1]))
    wanted = torch.stack(losses).mean().exp().item()
    assert sliding(model, IDS, None) == pytest.approx(wanted, rel=1e-4)
    with_start = evaluate(model, IDS, START)
    assert with_start["evicted"] == pytest.approx(wanted, rel=1e-4)


def test_the_table_and_the_curve(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    distill(replace(config, steps=2), tmp_path / "logit")
    run = read_run(tmp_path / "logit")
    rows = dict(rows_of([run]))
    assert list(rows)[:3] == list(run["baselines"])
    assert rows["one logit a head, fitted to k'"]["step"] == 0
    assert rows["one logit a head, 2 steps"] == run["log"][-1]
    with_token, transplanted = (run["baselines"][name]["perplexity"] for name in list(rows)[0:3:2])
    assert with_token == pytest.approx(transplanted, rel=1e-4)
    curve([run], str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").stat().st_size > 1000
