"""The training example: a killed run that goes on ends in the same weights, and the tasks are what
they say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import biassurgery as bs

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from backcopy import START, TRIGGERS, Backcopy  # noqa: E402
from local_text import LocalText  # noqa: E402
from plot_gpt2_attention_bias import (  # noqa: E402
    TITLES,
    curves,
    figure9,
    figure10,
    growth,
    read_runs,
    row,
)
from train_gpt2_attention_bias import (  # noqa: E402
    ACCELERATED,
    PRESETS,
    WAYS,
    Config,
    build_model,
    draw,
    inputs,
    loss_of,
    predict,
    train,
)

TINY = Config(
    "backcopy",
    layers=2,
    heads=2,
    width=16,
    length=12,
    steps=7,
    batch=4,
    rows=2,
    warmup=2,
    decay=0.1,
    every=3,
    evaluated=4,
)


def weights(folder: Path, way: str) -> dict[str, torch.Tensor]:
    patch = load_file(folder / "model" / "surgery.safetensors") if way == "bias" else {}
    return {
        **load_file(folder / "model" / "model.safetensors"),
        **{f"patch {name}": value for name, value in patch.items()},
    }


def assert_same_end(one: Path, other: Path, way: str) -> None:
    first = weights(one, way)
    second = weights(other, way)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_to_the_same_end(way: str, tmp_path: Path) -> None:
    train(TINY, way, 0, tmp_path / "whole")
    train(TINY, way, 0, tmp_path / "stopped", stop_at=5)  # two steps after the state of step 3
    assert not (tmp_path / "stopped" / "model").exists()
    assert [folder.name for folder in (tmp_path / "stopped").glob("step_*")] == ["step_3"]
    train(TINY, way, 0, tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped", way)
    train(TINY, way, 1, tmp_path / "another")
    assert not torch.equal(
        weights(tmp_path / "whole", way)["transformer.wte.weight"],
        weights(tmp_path / "another", way)["transformer.wte.weight"],
    )


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    config = replace(TINY, steps=60, every=5)
    file = tmp_path / "config.json"
    run = tmp_path / "bias-0"
    file.write_text(json.dumps(asdict(config)))
    command = [
        sys.executable,
        str(EXAMPLES / "train_gpt2_attention_bias.py"),
        "--task",
        "backcopy",
        "--way",
        "bias",
        "--config",
        str(file),
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 100
    while not any(run.glob("step_[1-9]*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "model").exists()
    train(config, "bias", 0, run)
    train(config, "bias", 0, tmp_path / "whole")
    assert_same_end(run, tmp_path / "whole", "bias")


def test_a_late_run_keeps_its_state_and_goes_on(tmp_path: Path) -> None:
    train(TINY, "bias", 0, tmp_path / "late", minutes=0)
    assert [folder.name for folder in (tmp_path / "late").glob("step_*")] == ["step_0"]
    train(TINY, "bias", 0, tmp_path / "late")
    train(TINY, "bias", 0, tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "late", "bias")


def test_the_preset_for_a_gpu_is_of_the_size_it_says() -> None:
    config = PRESETS["gpu"]
    with torch.device("meta"):
        model = build_model(config, 256, "default")
    assert 30e6 < sum(parameter.numel() for parameter in model.parameters()) < 34e6
    assert 240e3 < config.batch * config.length < 255e3
    assert config.batch % config.rows == 0
    assert ACCELERATED["gpu"] == {"mixed_precision": "bf16", "dynamo_backend": "inductor"}


@pytest.mark.long
def test_the_preset_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    small = {"layers": 2, "heads": 2, "width": 16, "length": 12, "steps": 3, "every": 2}
    file.write_text(json.dumps({**small, "batch": 4, "rows": 2, "evaluated": 4}))
    script = str(EXAMPLES / "train_gpt2_attention_bias.py")
    command = [sys.executable, script, "--preset", "gpu", "--config", str(file), "--way", "bias"]
    command += ["--minutes", "60"]  # compiling takes long on a busy machine
    # A process of its own: accelerate holds to the first precision that it was told.
    # A cache of compiled code of its own, for another installation may be writing to the other.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "bias-0" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[-1]["loss"] != lines[0]["loss"]
    assert max(max(heads) for heads in lines[-1]["bias_share"]) > 0
    assert (tmp_path / "bias-0" / "model" / "surgery.safetensors").is_file()


def test_a_run_of_another_config_is_refused(tmp_path: Path) -> None:
    train(TINY, "default", 0, tmp_path, stop_at=4)
    with pytest.raises(SystemExit, match="another"):
        train(TINY, "sink", 0, tmp_path)


def test_rows_at_a_time_do_not_change_the_step(tmp_path: Path) -> None:
    train(TINY, "default", 0, tmp_path / "halves")
    train(replace(TINY, rows=4), "default", 0, tmp_path / "whole")
    halves, whole = (weights(tmp_path / name, "default") for name in ("halves", "whole"))
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-3, atol=1e-4)


def test_the_saved_model_with_its_biases_is_the_trained_one(tmp_path: Path) -> None:
    train(TINY, "bias", 0, tmp_path)
    model = bs.load_patch(
        GPT2LMHeadModel.from_pretrained(tmp_path / "model"), tmp_path / "model"
    ).eval()
    task = Backcopy()
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    ids = draw(task, TINY.evaluated, TINY, seed=-1, held_out=True)
    with torch.no_grad():
        loss = loss_of(predict(model, ids, task.tokens, "bias"), ids).item()
        without = loss_of(predict(bs.unpatch_model(model), ids, task.tokens, "bias"), ids).item()
    assert loss == pytest.approx(last["loss"], rel=1e-5)
    assert abs(without - loss) > 1e-6


def test_all_ways_begin_with_the_same_weights_and_targets() -> None:
    task = Backcopy()
    logits = {}
    ids = draw(task, 3, TINY, seed=5)
    for way in WAYS:
        torch.manual_seed(0)
        model = build_model(TINY, task.tokens, way).eval()
        assert torch.equal(model.transformer.wte.weight[0], build(0).transformer.wte.weight[0])
        logits[way] = predict(model, ids, task.tokens, way)
        assert logits[way].shape == (3, TINY.length, task.tokens + 1)
    assert inputs(ids, task.tokens, "sink")[:, 0].eq(task.tokens).all()
    assert torch.equal(inputs(ids, task.tokens, "sink")[:, 1:], inputs(ids, task.tokens, "default"))
    assert all(
        not torch.allclose(logits["default"], logits[way], atol=1e-4) for way in ("sink", "bias")
    )


def build(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return build_model(TINY, Backcopy().tokens, "default")


def test_backcopy_follows_its_rules() -> None:
    task = Backcopy()
    ids = task.sample(200, 40, torch.Generator().manual_seed(0))
    assert torch.equal(ids, task.sample(200, 40, torch.Generator().manual_seed(0)))
    assert ids[:, 0].eq(START).all()
    assert task.trigger.sum() == len(TRIGGERS)
    copied = free = 0
    for sequence in ids.tolist():
        for at in range(1, 40):
            if task.trigger[sequence[at - 1]]:
                assert sequence[at] == sequence[at - 2] != START
                copied += 1
            else:
                assert task.chain[sequence[at - 1], sequence[at]] > 0
                free += 1
    assert copied > 500
    assert free > 500
    torch.testing.assert_close(task.chain.sum(1), torch.ones(task.tokens, dtype=torch.float64))


def test_backcopy_scores_are_divergences() -> None:
    task = Backcopy()
    ids = task.sample(8, 20, torch.Generator().manual_seed(0))
    last = ids[:, :-1]
    copy = torch.nn.functional.one_hot(ids[:, 1:], task.tokens).double()
    truth = torch.where(task.trigger[last].unsqueeze(-1), copy, task.chain[last])
    perfect = task.scores(truth.clamp(min=1e-300).log(), ids)
    assert perfect == pytest.approx({"excess_trigger": 0.0, "excess_other": 0.0}, abs=1e-12)
    uniform = task.scores(torch.full(truth.shape, 1 / task.tokens, dtype=torch.float64).log(), ids)
    entropy = -torch.xlogy(truth, truth).sum(-1)[~task.trigger[last]].mean().item()
    log = torch.tensor(float(task.tokens), dtype=torch.float64).log().item()
    assert uniform == pytest.approx({"excess_trigger": log, "excess_other": log - entropy})


def test_text_windows_are_of_the_text(tmp_path: Path) -> None:
    text = "".join(chr(97 + at * at % 26) for at in range(5000))
    (tmp_path / "a.txt").write_text(text)
    task = LocalText(str(tmp_path), None)
    assert task.tokens == 256
    for held_out in (False, True):
        for window in task.sample(5, 20, torch.Generator().manual_seed(0), held_out):
            at = text.find(bytes(window.tolist()).decode())
            assert at >= 0
    assert len(task.held_out) == 50
    assert len(task.train) == 4950


def test_rows_of_the_table_are_the_last_evaluation(tmp_path: Path) -> None:
    train(TINY, "sink", 3, tmp_path / "sink-3")
    train(TINY, "bias", 3, tmp_path / "bias-3", stop_at=4)
    assert read_runs(tmp_path) == {"sink": [tmp_path / "sink-3"]}  # the other one is not finished
    last = json.loads((tmp_path / "sink-3" / "log.jsonl").read_text().splitlines()[-1])
    found = row(tmp_path / "sink-3")
    assert (found["way"], found["seed"], found["step"], found["loss"]) == (
        "sink",
        3,
        TINY.steps,
        last["loss"],
    )
    assert found["top_1"] == [layer[0] for layer in last["top"]]
    assert found["sink_share"] == [max(layer) for layer in last["share"]]
    assert found["massive_layers"] == []


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)").use("Agg")
    for way in WAYS:
        train(TINY, way, 0, tmp_path / f"{way}-0")
    for draw_figure in (figure9, figure10, growth, curves):
        draw_figure(read_runs(tmp_path), str(tmp_path / "all"))
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "all_figure9.png",
        "all_figure10.png",
        "all_growth.png",
        "all_curves.png",
    }
    written = json.loads((tmp_path / "all_curves.json").read_text())
    for way in WAYS:
        logged = (tmp_path / f"{way}-0" / "log.jsonl").read_text().splitlines()
        rows = written[TITLES[way]]
        for found, line in zip(rows, map(json.loads, logged), strict=True):
            assert (found["step"], found["loss"]) == (line["step"], line["loss"])
            assert found["top_1"] == max(top[0] for top in line["top"])
            assert found["median"] in line["median"]
