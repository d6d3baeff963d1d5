"""The command line: the numbers of the library, tables for people, one JSON document for machines,
exit codes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery.evaluate import perplexity
from biassurgery.findings import render
from tests.checkpoints import tokenizer
from tests.cli.running import CPU, LENGTH, common, run, run_json
from tests.models import CHANNEL, LAYER, LAYERS, START, planted


def windows(text: str, bos: bool = True) -> torch.Tensor:
    ids = tokenizer(bos=False)(text)["input_ids"]
    step = LENGTH - bos
    return torch.tensor(
        [[0] * bos + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    )


def test_detect(llama: Path) -> None:
    rows = windows((llama / "text.txt").read_text())
    expected = bs.detect(planted("llama"), list(rows.split(8)))
    found = run_json("detect", *common(llama))
    assert found["model"] | {"name": ""} == {
        "name": "",
        "architecture": "llama",
        "blocks": LAYERS,
        "width": 64,
        "dtype": "float32",
        "device": "cpu",
    }
    assert found["data"]["windows"] == len(rows)
    assert found["data"]["BOS"] == "<s> (0) in front of every window, as the tokenizer does"
    assert [(site["layer"], site["channel"], site["role"]) for site in found["sites"]] == [
        (site.layer, site.channel, site.role) for site in expected.sites
    ]
    assert found["sites"][0]["mean"] == pytest.approx(expected.sites[0].mean, rel=1e-6)
    assert {site["channel"] for site in found["sites"]} == {CHANNEL}
    assert [layer["top"] for layer in found["layers"]] == [
        pytest.approx(layer.top, rel=1e-6) for layer in expected.layers
    ]
    assert (found["sequences"], found["tokens"]) == (len(rows), len(rows) * LENGTH)


def test_the_document_holds_all_that_the_text_shows(llama: Path) -> None:
    rows = windows((llama / "text.txt").read_text())
    expected = bs.detect(planted("llama"), list(rows.split(8)), tokenizer=tokenizer(bos=True))
    found = run_json("detect", *common(llama))
    assert found["summary"] == list(expected.summary)
    assert [role["words"] for role in found["roles"]] == [
        [asdict(token) for token in role.words] for role in expected.roles
    ]
    assert found["roles"][0]["words"][0]["text"] == "<s>"
    assert found["sinks"]["metric"] == pytest.approx(expected.sinks.metric, abs=1e-6)
    assert [layer["attention"] for layer in found["sinks"]["layers"]] == [
        pytest.approx(layer.attention, rel=1e-5) for layer in expected.sinks.layers
    ]
    assert found["standing_out"] is None
    assert (found["no_sinks"], found["not_placed"]) == ("", expected.not_placed)
    none = run_json("detect", *common(llama), "--min-magnitude", 2e4)
    assert none["standing_out"]["channel"] == CHANNEL


def test_detect_for_people(llama: Path) -> None:
    result = run("detect", *common(llama))
    assert "BOS <s> (0) in front of every window, as the tokenizer does" in result.stdout
    assert "float32 on cpu" in result.stdout
    assert result.stdout.splitlines()[3].startswith(f"massive: channel {CHANNEL} in blocks {LAYER}")
    cells = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in cells if line[:3] == [str(LAYER), str(CHANNEL), "start"]] == [
        [str(LAYER), str(CHANNEL)]
    ]
    assert "\x1b" not in result.stdout  # colours are for terminals


@pytest.mark.parametrize(("policy", "bos"), [("auto", True), ("yes", True), ("no", False)])
def test_the_bos_policy(llama: Path, policy: str, bos: bool) -> None:
    rows = windows((llama / "text.txt").read_text(), bos)
    found = run_json("detect", *common(llama), "--bos", policy)
    assert found["data"]["windows"] == len(rows)
    assert found["data"]["BOS"].startswith("<s> (0)" if bos else "none")
    assert found["data"]["BOS"].endswith("as the tokenizer does") == (policy == "auto")
    at_start = [
        site["mean"] for site in found["sites"] if (site["layer"], site["role"]) == (LAYER, "start")
    ]
    assert (
        any(mean == pytest.approx(START, rel=0.01) for mean in at_start) == bos
    )  # without BOS a window may start with a full stop


def test_thresholds(llama: Path) -> None:
    assert run_json("detect", *common(llama), "--min-magnitude", 1e6)["sites"] == []
    none = run("calibrate", *common(llama), "--min-ratio", 1e6)
    assert (
        "No massive activations: no magnitude is above 100 and above 1e+06 times the median"
        in " ".join(none.stdout.split())
    )


def test_split_and_limit(llama: Path) -> None:
    rows = windows((llama / "text.txt").read_text())
    found = run_json("calibrate", *common(llama), "--split", "odd", "--max-windows", 3)
    assert found["data"]["windows"] == 3
    expected = bs.calibrate(planted("llama"), [rows[1:6:2]])
    assert [site["mean"] for site in found["sites"]] == [
        pytest.approx(site.mean, rel=1e-6) for site in expected
    ]


def test_calibrate_then_eval(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "sites.safetensors"
    rows = windows((llama / "text.txt").read_text())
    saved = run_json("calibrate", *common(llama), "--split", "even", "--sites", file)
    sites = bs.Sites.load(file)
    assert saved["saved"] == str(file)
    assert [site["mean"] for site in saved["sites"]] == [site.mean for site in sites]
    assert str(llama / "text.txt") in sites.origin.source

    found = run_json("eval", *common(llama), "--split", "odd", "--sites", file)
    results = {row["mode"]: row for row in found["results"]}
    assert list(results) == ["original", "set_zero", "set_mean", "zero_random"]
    model = planted("llama")
    odd = list(rows[1::2].split(8))
    for mode, row in results.items():
        if mode != "original":
            bs.patch_model(model, mode, sites=sites)
        expected = perplexity(model, odd)
        bs.unpatch_model(model)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert row["loss"] == pytest.approx(math.log(expected), rel=1e-6)
    assert results["set_mean"]["loss"] == pytest.approx(results["original"]["loss"], abs=1e-3)
    assert abs(results["set_zero"]["loss"] - results["original"]["loss"]) > 0.01
    assert found["layers"] == "first"

    table = run("eval", *common(llama), "--split", "odd", "--sites", file).stdout
    cells = [line.split() for line in table.splitlines()]
    assert ["mode", "perplexity", "loss"] in cells
    assert [
        "original",
        *(render.number(results["original"][name]) for name in ("perplexity", "loss")),
    ] in cells


def test_modes_and_layers(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "sites.safetensors"
    run("calibrate", *common(llama), "--sites", file)
    limited = (*common(llama), "--max-windows", 4, "--sites", file)
    found = run_json(
        "eval",
        *limited,
        "--mode",
        "set_value:value=0",
        "--mode",
        "noise:scale=2.5",
        "--mode",
        "set_zero",
        "--layers",
        "1,2",
    )
    results = {row["mode"]: row["perplexity"] for row in found["results"]}
    assert list(results) == ["original", "set_value(value=0.0)", "noise(scale=2.5)", "set_zero"]
    assert results["set_value(value=0.0)"] == results["set_zero"]
    assert found["layers"] == [1, 2]
    sites = bs.Sites.load(file)
    with bs.patched(planted("llama"), "set_zero", sites=sites, layers=[1, 2]) as model:
        expected = perplexity(model, windows((llama / "text.txt").read_text())[:4])
    assert results["set_zero"] == pytest.approx(expected, rel=1e-6)


def test_packaged_data_where_none_are_given(llama: Path) -> None:
    result = run("eval", llama, "--length", LENGTH, "--max-windows", 4, *CPU, "--json")
    found = json.loads(result.stdout)
    assert found["data"]["source"] == "packaged evaluation text"
    assert "packaged public-domain English text" in found["sites"]["origin"]["source"]
    assert result.stderr.splitlines()[0].startswith(
        "warning: sites: none were given; calibrating on packaged"
    )


def test_several_texts(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a" * 1000)
    one = run_json("detect", *common(llama))["data"]["windows"]
    both = run_json("detect", *common(llama), "--text", tmp_path / "other.txt")["data"]
    assert both["windows"] == (2000 + 1000) // (LENGTH - 1) > one
    assert both["source"].endswith("other.txt")


def test_dtype(llama: Path) -> None:
    assert (
        run_json("detect", *common(llama), "--dtype", "bfloat16", "--max-windows", 2)["model"][
            "dtype"
        ]
        == "bfloat16"
    )


def test_infinities_become_null(llama: Path, tmp_path: Path) -> None:
    model = planted("llama")
    model.lm_head.weight.data *= 1e6  # so sure of itself that one wrong token is enough
    model.save_pretrained(tmp_path)
    tokenizer(bos=True).save_pretrained(tmp_path)
    run("calibrate", *common(llama), "--sites", tmp_path / "sites.safetensors")
    options = (
        tmp_path,
        *common(llama)[1:],
        "--sites",
        tmp_path / "sites.safetensors",
        "--mode",
        "set_mean",
    )
    assert [row["perplexity"] for row in run_json("eval", *options)["results"]] == [None, None]
    assert ["original", "inf", "inf"] in [
        line.split() for line in run("eval", *options).stdout.splitlines()
    ]


def test_list() -> None:
    found = run_json("list")
    assert {
        "llama",
        "mistral",
        "mixtral",
        "gpt2",
        "falcon",
        "mpt",
        "phi",
        "opt",
        "gpt_neox",
    } <= found["families"].keys()
    assert found["families"]["timm_vit"] == "image"
    assert {
        "set_mean",
        "set_zero",
        "set_value",
        "noise",
        "shuffle",
        "zero_random",
        "instrument",
        "attention_bias",
        "transplant",
        "fix_registers",
        "test_time_registers",
    } <= found["modes"].keys()  # other tests may have defined some of their own
    assert found["published"]["meta-llama/Llama-2-7b-hf"].startswith("layers 1 to ")
    assert len(found["published"]) == 18
    table = run("list").stdout
    for name in (*found["families"], *found["modes"], *found["published"]):
        assert name in table


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == bs.__version__
    assert "130" in run("eval", "--help").stdout
    for command in ("detect", "calibrate", "eval", "list", "demo"):
        assert command in run("--help").stdout
