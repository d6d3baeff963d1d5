"""Tasks of lm-evaluation-harness on a patched model, against scores written out.

The tasks are local files: nothing asks the hub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from biassurgery.errors import BadOption, FileError, MissingPackage, UnsupportedModel
from biassurgery.integrations.lm_eval import TaskScores
from tests.checkpoints import tokenizer
from tests.cli.running import run, run_json
from tests.models import planted, planted_vit

QUESTIONS = [
    (text[:30], [text[30:34], text[50:54], text[60:64]])
    for text in (packaged_text("evaluation")[at : at + 80] for at in range(0, 2400, 80))
]


def task_folder(folder: Path) -> Path:
    """Two tasks: the first answer is right, and the last one."""
    folder.mkdir(exist_ok=True)
    for name, right in (("first", 0), ("last", 2)):
        rows = [{"q": q, "choices": choices, "gold": right} for q, choices in QUESTIONS]
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}_answer\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {data}\ntest_split: test\noutput_type: multiple_choice\n"
            "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n"
            "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
        )
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the eval extra)")
    return task_folder(tmp_path_factory.mktemp("tasks"))


@torch.no_grad()
def accuracies(model: Any, front: list[int]) -> dict[str, float]:
    """The answer with the largest log-likelihood, written out: one question at a time."""
    words = tokenizer(bos=False)
    right = {"first_answer": 0, "last_answer": 0}
    for question, choices in QUESTIONS:
        scores = []
        context = [*front, *words(question)["input_ids"]]
        for choice in choices:
            answer = words(choice)["input_ids"]
            ids = torch.tensor([[*context, *answer]])
            logits = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
            scores.append(sum(logits[i, token].item() for i, token in enumerate(answer)))
        right["first_answer"] += scores.index(max(scores)) == 0
        right["last_answer"] += scores.index(max(scores)) == 2
    return {name: count / len(QUESTIONS) for name, count in right.items()}


@pytest.mark.parametrize(
    "front",
    [(0,), pytest.param((), marks=pytest.mark.long), pytest.param((7,), marks=pytest.mark.long)],
)
def test_scores_are_those_of_the_model_with_its_start_token(
    tasks: Path, front: tuple[int, ...]
) -> None:
    model = planted("llama")
    names = ("first_answer", "last_answer")
    scores = TaskScores(names, tokenizer(bos=True), front=front, folder=tasks, batch_size=4)
    wanted = accuracies(model, list(front))
    found = scores.of(model)
    assert {name: found[name] for name in names} == pytest.approx(wanted)
    assert found["mean"] == pytest.approx(sum(wanted.values()) / 2)


@pytest.mark.long
def test_the_start_token_and_the_patch_matter(tasks: Path) -> None:
    model = planted("llama")
    names = ("first_answer",)
    scores = TaskScores(names, tokenizer(bos=True), front=(0,), folder=tasks, batch_size=30)
    plain = scores.of(model)
    assert plain["first_answer"] == pytest.approx(accuracies(model, [0])["first_answer"])
    assert plain != scores.of(model, front=())
    sites = bs.Sites([bs.Site(1, 5, "start", 3000.0, gate=1e-9)])
    with bs.patched(model, "set_value", value=500.0, sites=sites):
        wanted = accuracies(model, [0])["first_answer"]
        assert scores.of(model)["first_answer"] == pytest.approx(wanted)
        assert wanted != plain["first_answer"]
    assert scores.of(model) == plain
    assert scores.tokenizer.pad_token is None  # the harness changed one of its own


@pytest.mark.long
def test_what_is_asked_for_is_all_that_is_asked(tasks: Path) -> None:
    words = tokenizer(bos=True)
    few = TaskScores(("first_answer",), words, front=(0,), folder=tasks, limit=1)
    assert few.of(planted("llama"))["first_answer"] in (0.0, 1.0)


@pytest.mark.long
def test_the_command_gives_the_papers_columns(llama: Path, tasks: Path) -> None:
    given = ("eval", llama, "--tasks", "first_answer,last_answer", "--task-path", tasks)
    found = run_json(*given, "--device", "cpu", "--length", 32)
    assert found["tasks"] == ["first_answer", "last_answer"]
    assert [row["mode"] for row in found["results"]] == ["original", "set_zero", "set_mean"]
    wanted = accuracies(planted("llama"), [0])
    original = found["results"][0]
    assert {name: original[name] for name in wanted} == pytest.approx(wanted)
    options = ("--bos", "no", "--mode", "set_mean", "--device", "cpu", "--length", 32)
    without = run_json(*given, *options)
    plain = accuracies(planted("llama"), [])
    behind = run_json(*given, *options, "--start", "7")
    other = accuracies(planted("llama"), [7])
    assert {name: behind["results"][0][name] for name in other} == pytest.approx(other)
    assert {name: without["results"][0][name] for name in plain} == pytest.approx(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ("--tasks", "nonsense_of_nobody"),
            "nonsense_of_nobody not known",
            marks=pytest.mark.long,  # it reads the harness's own tasks
        ),
        (("--tasks", "broken_task"), "broken_task cannot be loaded"),
        (("--tasks", ","), "names none"),
        (("--num-fewshot", 3), "tasks: none are named"),
        (("--tasks", "first_answer", "--text", "a.txt"), "leave --text and --images out"),
        (("--tasks", "first_answer", "--checkpoint", "a"), "tasks start over"),
    ],
)
def test_refusals(llama: Path, tasks: Path, options: tuple[object, ...], message: str) -> None:
    (tasks / "broken.yaml").write_text(
        "task: broken_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        "    test: /absent.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
    )
    result = run("eval", llama, *options, "--task-path", tasks, "--device", "cpu", code=1)
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_images_have_no_tasks(tasks: Path) -> None:
    scores = TaskScores(("first_answer",), tokenizer(bos=True), folder=tasks)
    with pytest.raises(UnsupportedModel, match="need a language model"):
        scores.of(planted_vit())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingPackage, match=r"pip install 'biassurgery\[eval\]'"):
        TaskScores(("piqa",), tokenizer(bos=True))


@pytest.mark.long
def test_a_folder_that_is_none(tasks: Path) -> None:
    with pytest.raises(FileError, match="is not a folder"):
        TaskScores(("first_answer",), tokenizer(bos=True), folder=tasks / "absent")
    with pytest.raises(BadOption, match="not known"):
        TaskScores(("x_of_nobody",), tokenizer(bos=True), folder=tasks)
