"""The verbs of the library on the command line: every mode in eval, record, patch, generate.

The numbers are those of the library, called by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import biassurgery as bs
from biassurgery.evaluate import perplexity
from tests import vision
from tests.checkpoints import tokenizer
from tests.cli.running import CPU, LENGTH, common, run, run_json
from tests.models import IMAGE, planted
from tests.photographs import paint, write_table


def rows(llama: Path, count: int) -> torch.Tensor:
    """(count, LENGTH) the windows of the text, each behind BOS."""
    ids = tokenizer(bos=False)((llama / "text.txt").read_text())["input_ids"]
    step = LENGTH - 1
    return torch.tensor([[0, *ids[at * step : (at + 1) * step]] for at in range(count)])


def behind_first(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Windows of which the first token behind BOS is not scored."""
    labels = ids.clone()
    labels[:, 1] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture(scope="module")
def key_values(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("findings") / "key_values.safetensors"
    found = run_json("calibrate", *common(llama), "--max-windows", 4, "--key-values", file)
    assert found["files"] == {"sites": None, "key_values": str(file), "means": None}
    return file


def test_calibrate_measures_key_values(llama: Path, key_values: Path) -> None:
    wanted = bs.calibrate_key_values(planted("llama"), [rows(llama, 4)])
    found = bs.KeyValues.load(key_values)
    assert torch.allclose(found.keys, wanted.keys, atol=1e-6)
    assert found.spread == wanted.spread == 0


@pytest.mark.parametrize("given", [True, False])
def test_eval_transplant_scores_the_same_tokens(llama: Path, key_values: Path, given: bool) -> None:
    """Without its start token, but with its keys and values, the model says what it said."""
    files = ("--key-values", key_values) if given else ()
    options = ("--max-windows", 4, "--mode", "transplant", "--mode", "attention_bias", *files)
    found = run_json("eval", *common(llama), *options)
    results = {row["mode"]: row["perplexity"] for row in found["results"]}
    assert list(results) == ["original", "transplant", "attention_bias(init=KeyValues)"]
    model = planted("llama")
    ids = rows(llama, 4)
    wanted = perplexity(model, behind_first(ids))
    assert wanted != pytest.approx(perplexity(model, ids), rel=1e-4)
    assert results["original"] == pytest.approx(wanted, rel=1e-6)
    assert results["transplant"] == pytest.approx(wanted, rel=1e-4)
    assert perplexity(model, ids[:, 1:]) != pytest.approx(wanted, rel=1e-3)  # merely dropped
    found_key_values = bs.KeyValues.load(key_values)
    with bs.patched(model, "attention_bias", init=found_key_values):
        biased = perplexity(model, behind_first(ids))
    assert results["attention_bias(init=KeyValues)"] == pytest.approx(biased, rel=1e-5)
    assert biased != pytest.approx(wanted, rel=1e-4)
    assert found["sites"] is None
    table = run("eval", *common(llama), *options).stdout
    assert f"key_values: {key_values if given else 'measured'}" in "".join(table.splitlines())


def test_eval_transplant_behind_a_start_token(llama: Path) -> None:
    """`--start` puts a token in front that the tokenizer does not; without it, nothing is lost."""
    options = ("--bos", "no", "--start", "5", "--max-windows", 4, "--mode", "transplant")
    found = run_json("eval", *common(llama), *options)
    original, transplanted = (row["perplexity"] for row in found["results"])
    text = torch.tensor(tokenizer(bos=False)((llama / "text.txt").read_text())["input_ids"])
    length = found["data"]["length"]
    ids = text[: 4 * length].view(4, length)
    behind = torch.nn.functional.pad(ids, (1, 0), value=5)
    assert original == pytest.approx(perplexity(planted("llama"), behind_first(behind)), rel=1e-6)
    assert transplanted == pytest.approx(original, rel=1e-4)


def test_generate_and_record_read_behind_a_start_token(llama: Path, tmp_path: Path) -> None:
    front = ("--bos", "no", "--start", "5", *CPU)
    given = ("--prompt", "the cat", "--max-new-tokens", 4, "--mode", "instrument")
    found = run_json("generate", llama, *given, *front)
    ids = [5, *tokenizer(bos=False)("the cat")["input_ids"]]
    assert found["results"][0]["tokens"] == greedy(planted("llama"), ids, 4)
    file = tmp_path / "record.safetensors"
    options = ("--what", "block_output", "--layers", 0, "--output", file)
    run_json("record", llama, "--text", llama / "text.txt", "--length", 8, *options, *front)
    read = load_file(file)
    assert read["input_ids"][0, 0] == 5
    assert read["block_output.0"].shape[1] == read["input_ids"].shape[1]


def test_eval_attention_bias_with_options(llama: Path) -> None:
    names = ("attention_bias:init=zero_effect", "attention_bias:kind=off_by_one")
    modes = [argument for name in names for argument in ("--mode", name)]
    found = run_json("eval", *common(llama), "--max-windows", 4, *modes)
    original, nothing, off_by_one = (row["perplexity"] for row in found["results"])
    assert nothing == pytest.approx(original, rel=1e-5)
    with bs.patched(planted("llama"), "attention_bias", kind="off_by_one") as model:
        assert off_by_one == pytest.approx(perplexity(model, rows(llama, 4)), rel=1e-6)


@pytest.fixture(scope="module")
def registers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 with registers and a classifier, and labelled images beside it."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("registers")
    vision.planted("dinov2_with_registers").save_pretrained(folder)
    size = {"height": IMAGE, "width": IMAGE}
    processor: Any = tf.ViTImageProcessor(size=size)
    processor.save_pretrained(folder)
    for shade in range(4):
        paint(folder / f"{shade}.png", 60 * shade)
    table = [{"file": f"{shade}.png", "class_index": shade} for shade in range(4)]
    write_table(folder, table)
    return folder


def test_eval_fix_registers(registers: Path, tmp_path: Path) -> None:
    file = tmp_path / "means.safetensors"
    given = (registers, "--images", registers, *CPU)
    run_json("calibrate", *given, "--means", file)
    means = bs.RegisterMeans.load(file)
    assert means.count == 4
    fill = ("--mode", "fix_registers:fill=zero")
    found = run_json("eval", *given, "--mode", "fix_registers", *fill, "--means", file)
    assert [row["mode"] for row in found["results"]] == [
        "original",
        "fix_registers(means=RegisterMeans)",
        "fix_registers(fill='zero')",
    ]
    measured = run_json("eval", *given, "--mode", "fix_registers")
    assert [row["mode"] for row in measured["results"]] == [
        "original",
        "fix_registers(means=RegisterMeans)",
    ]


def test_record_writes_what_the_library_records(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    what = ("--what", "sink_mass", "--what", "block_output")
    found = run_json("record", *common(llama), *what, "--layers", "1,3", "--output", file)
    ids = rows(llama, 1)
    tensors = load_file(file)
    assert tensors["input_ids"].equal(ids)
    assert set(tensors) == {"input_ids", *found["tensors"]}
    assert found["tensors"]["sink_mass.3"] == [1, 4, LENGTH]
    model = planted("llama")
    with torch.no_grad(), bs.record(model, ("sink_mass", "block_output"), [1, 3]) as rec:
        model(ids)
    for name in ("sink_mass", "block_output"):
        for layer in (1, 3):
            assert torch.allclose(tensors[f"{name}.{layer}"], rec[name][layer], atol=1e-5)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["biassurgery.record"])["data"]["windows"] == 1


def test_record_of_a_prompt_under_a_patch(llama: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "patch", tmp_path / "record.safetensors"
    run_json("patch", llama, folder, "--mode", "set_value:value=5", *common(llama)[1:])
    options = ("--prompt", "the cat", "--what", "block_output", "--patch", folder)
    found = run_json("record", llama, *options, "--output", file, *CPU)
    assert found["tensors"]["block_output.4"] == [1, 8, 64]
    model = bs.load_patch(planted("llama"), folder)
    ids = torch.tensor([[0, *tokenizer(bos=False)("the cat")["input_ids"]]])
    with torch.no_grad(), bs.record(model, "block_output") as rec:
        model(ids)
    assert torch.allclose(load_file(file)["block_output.4"], rec["block_output"][4], atol=1e-5)
    assert rec["block_output"][1][0, 0].eq(5).any()


def test_record_of_images(registers: Path, tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    options = ("--images", registers, "--max-images", 2, "--what", "sink_mass", "--layers", 0)
    found = run_json("record", registers, *options, "--output", file, *CPU)
    assert found["tensors"]["sink_mass.0"][0] == 2
    assert "input_ids" not in load_file(file)


@pytest.mark.parametrize("mode", ["set_mean", "transplant", "attention_bias:kind=v"])
def test_patch_writes_a_folder_that_loads(llama: Path, tmp_path: Path, mode: str) -> None:
    found = run_json("patch", llama, tmp_path / "patch", "--mode", mode, *common(llama)[1:])
    model = bs.load_patch(planted("llama"), tmp_path / "patch")
    (applied,) = bs.patches(model)
    assert applied.mode.name == mode.split(":")[0]
    assert found["patches"] == [
        {
            "mode": applied.mode.name,
            "layers": list(applied.layers),
            "sites": len(applied.sites),
        }
    ]
    if mode == "set_mean":
        everything = rows(llama, 2000 // (LENGTH - 1))
        measured = bs.calibrate(planted("llama"), list(everything.split(8)))
        means = {(s.layer, s.channel, s.role): s.mean for s in measured}
        for site in applied.sites:
            assert site.mean == pytest.approx(means[site.layer, site.channel, site.role], rel=1e-6)


def test_a_patch_of_several_modes(llama: Path, tmp_path: Path) -> None:
    modes = ("--mode", "set_mean", "--mode", "instrument")
    result = run("patch", llama, tmp_path / "patch", *modes, *common(llama)[1:])
    assert "set_mean on layers 1" in result.stdout
    model = bs.load_patch(planted("llama"), tmp_path / "patch")
    assert [patch.mode.name for patch in bs.patches(model)] == ["set_mean", "instrument"]


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The most likely tokens, one forward each, without a cache."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


def test_generate_shows_text_before_and_after(llama: Path, tmp_path: Path) -> None:
    mode = ("--mode", "set_value:value=500")
    run_json("patch", llama, tmp_path / "patch", *mode, *common(llama)[1:])
    options = ("--prompt", "the cat sat", "--max-new-tokens", 6)
    modes = ("--mode", "set_mean", "--mode", "transplant", "--patch", tmp_path / "patch")
    found = run_json("generate", *common(llama), *options, *modes)
    rows_by_mode = {row["mode"]: row for row in found["results"]}
    assert list(rows_by_mode) == ["original", "set_mean", "transplant", str(tmp_path / "patch")]
    words = tokenizer(bos=False)
    ids = [0, *words("the cat sat")["input_ids"]]
    wanted = greedy(planted("llama"), ids, 6)
    assert rows_by_mode["original"]["tokens"] == wanted
    assert rows_by_mode["transplant"]["tokens"] == wanted
    assert rows_by_mode["transplant"]["same"] == 6
    patched = greedy(bs.load_patch(planted("llama"), tmp_path / "patch"), ids, 6)
    other = rows_by_mode[str(tmp_path / "patch")]
    assert other["tokens"] == patched
    assert other["text"] == words.decode(patched)
    same = next((i for i, (a, b) in enumerate(zip(wanted, patched)) if a != b), 6)
    assert other["same"] == same
    text = run("generate", *common(llama), *options, *modes).stdout
    assert f"original: {words.decode(wanted)!r}" in text
    assert ("parts after" in text) == any(row["same"] < 6 for row in found["results"])


def test_generate_compares_zero_and_mean_where_nothing_is_asked(llama: Path) -> None:
    found = run_json("generate", *common(llama), "--max-new-tokens", 2)
    assert [row["mode"] for row in found["results"]] == ["original", "set_zero", "set_mean"]
    assert found["prompt"] == "Once upon a time"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "MODEL", "--mode", "transplant", "--key-values", "absent"), "absent is not a"),
        (("eval", "MODEL", "--mode", "transplant", "--key-values", "SITES"), "holds biassurgery"),
        (("eval", "MODEL", "--mode", "fix_registers"), "has no register tokens"),
        (("eval", "MODEL", "--mode", "fix_registers:fill=sand"), "fill: 'sand'"),
        (("eval", "MODEL", "--mode", "attention_bias:kind=salt"), "kind: 'salt' is not known"),
        (("eval", "MODEL", "--mode", "transplant", "--layers", "1"), "leave layers= out"),
        (("record", "MODEL", "--what", "soul", "--output", "a"), "what: 'soul' is not known"),
        (
            ("record", "MODEL", "--what", "q", "--output", "a", "--layers", "9"),
            "layers: 9 is outside",
        ),
        (("record", "MODEL", "--what", "q", "--output", "a", "--layers", "x"), "layers: 'x'"),
        (("record", "MODEL", "--what", "q", "--output", "a", "--layers", "first"), "'first'; use"),
        (("record", "MODEL", "--what", "q", "--output", "empty.txt/a"), "cannot write"),
        (("record", "MODEL", "--what", "q", "--output", "a", "--patch", "absent"), "absent"),
        (("patch", "MODEL", "empty.txt"), "empty.txt"),
        (("patch", "MODEL", "p", "--mode", "set_maen"), "mode: 'set_maen' is not known"),
        (("generate", "MODEL", "--patch", "absent"), "absent"),
        (("generate", "MODEL", "--bos", "no", "--prompt", ""), "holds no tokens"),
        (("generate", "MODEL", "--mode", "noise:scale=loud"), "write options as name=number"),
    ],
)
def test_a_refusal_is_a_line(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    sites = bs.Sites([bs.Site(1, 7, "start", 3000.0)])
    sites.save("sites.safetensors")
    places = {"MODEL": str(llama), "SITES": "sites.safetensors"}
    given = [places.get(argument, argument) for argument in arguments]
    result = run(*given, *CPU, "--length", LENGTH, "--max-windows", 4, "--json", code=1)
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_images_write_no_text(registers: Path) -> None:
    result = run("generate", registers, "--mode", "fix_registers", *CPU, code=1)
    assert "reads images" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", "x"),
        ("record", "x", "--what", "q"),
        ("patch", "x"),
        ("generate",),
        ("generate", "x", "--max-new-tokens", "0"),
        ("eval", "x", "--num-fewshot", "-1"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, code=2).stdout == ""


def test_the_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("detect", "calibrate", "eval", "record", "patch", "generate", "list", "demo"):
        assert command in text
