"""The command behind docs/serving.md's table of vLLM, with transformers where vLLM would be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import served  # noqa: E402

SINKS = ["sinks", "sinks, sliding window"] if served.has_sinks() else []


def stock(folder: Path) -> Any:
    """What a server does that reads weights, and honours sinks."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write` wrote."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("served")
    checkpoint(folder / "model", bos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "LENGTH", 12)
        model, written = str(folder / "model"), str(folder / "out")
        served.main(["write", model, written, "--start", "<s>", "--length", "24"])
    return folder / "out"


def cases(out: Path) -> list[served.Case]:
    return [served.read(out, number) for number in range(len(list(out.glob("*.json"))))]


def test_what_is_written_is_what_a_server_must_say(out: Path) -> None:
    kept = cases(out)
    assert [case.adapter or case.folder for case in kept] == [
        "start token in the prompt",
        "checkpoint",
        "saved with transplant",
        "cartridge",
        *SINKS,
        "saved with set_zero",
    ]
    said = {}
    for case in kept:
        model = stock(out / case.folder)

        def serve(case: served.Case, model: Any = model) -> served.Found:
            logits, greedy = served.says(model, case.prompt)
            likeliest = logits.log_softmax(-1).topk(5)
            rows = [
                dict(zip(tokens.tolist(), found.tolist(), strict=True))
                for tokens, found in zip(likeliest.indices, likeliest.values, strict=True)
            ]
            return rows, greedy

        name = case.adapter or case.folder
        said[name] = float(served.row(case, serve).split("|")[2])
        assert served.row(case, serve).startswith(f"| {name} | ")
    right = {"start token in the prompt", "checkpoint", *SINKS}
    assert all(said[name] < 1e-3 for name in right)
    # A stock class has no place for these, and transformers says nothing.
    assert all(said[name] > 1e-2 for name in said.keys() - right)


@pytest.mark.skipif(not SINKS, reason="GraniteSWAForCausalLM came with transformers 5.15")
def test_a_server_that_ignores_sinks_is_found(out: Path) -> None:
    [case] = [case for case in cases(out) if case.folder == "sinks"]
    model = stock(out / "sinks")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e9)
    logits, greedy = served.says(model, case.prompt)
    rows = [dict(enumerate(found.tolist())) for found in logits.log_softmax(-1)]
    off, alike = served.row(case, lambda _: (rows, greedy)).split("|")[2:4]
    assert float(off) > 1e-2
    assert alike.strip() in ("yes", "no")
