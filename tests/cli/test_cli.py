"""The command line: the numbers of the library, tables for people, one JSON document for machines,
exit codes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import biassurgery as bs
from biassurgery.cli import app
from biassurgery.data.packaged import packaged_text
from biassurgery.evaluate import perplexity
from biassurgery.findings import render
from tests import vision
from tests.models import CHANNEL, IMAGE, LAYER, LAYERS, START, planted
from tests.modes.test_defaults import checkpoint, tokenizer

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VIT = SHARED / "weights" / "vit_tiny_augreg" / "vit_tiny_patch16_224.safetensors"
IMAGES = SHARED / "images" / "imagenet_sample_200"
STORIES = SHARED / "weights" / "stories260K_hf"
ABSENT = "the folder `shared` beside the repository, with trained weights and images, is absent"
LENGTH = 32
CPU = ("--device", "cpu")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(run(*arguments, "--json").stdout, parse_constant=refuse)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted LLaMA with a tokenizer that puts BOS in front, and a text beside it."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint(folder, bos=True)
    (folder / "text.txt").write_text(packaged_text("evaluation")[:2000])
    return folder


def windows(text: str, bos: bool = True) -> torch.Tensor:
    ids = tokenizer(bos=False)(text)["input_ids"]
    step = LENGTH - bos
    return torch.tensor(
        [[0] * bos + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    )


def common(llama: Path) -> tuple[object, ...]:
    return llama, "--text", llama / "text.txt", "--length", LENGTH, *CPU


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


def test_detect_for_people(llama: Path) -> None:
    result = run("detect", *common(llama))
    assert "BOS <s> (0) in front of every window, as the tokenizer does" in result.stdout
    assert "float32 on cpu" in result.stdout
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
    } == found["modes"].keys()
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


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "MODEL", "--sites", "absent.safetensors"), "absent.safetensors is not a file"),
        (("eval", "MODEL", "--mode", "set_maen"), "mode: 'set_maen' is not known"),
        (("eval", "MODEL", "--mode", "set_value"), "set_value needs value="),
        (("eval", "MODEL", "--mode", "set_value:value=much"), "write options as name=number"),
        (("eval", "MODEL", "--mode", "set_zero:value"), "write options as name=number"),
        (("eval", "MODEL", "--mode", "set_zero:value=3"), "set_zero has no 'value'"),
        (("eval", "MODEL", "--layers", "last"), "layers: 'last'; use first, all, or indices"),
        (("detect", "MODEL", "--text", "absent.txt"), "absent.txt cannot be read"),
        (("detect", "MODEL", "--text", "empty.txt"), "holds no tokens"),
        (("detect", "MODEL", "--images", "."), "reads text; give --text"),
        (("detect", "MODEL", "--weights", "w.safetensors"), "is none that timm knows"),
        (
            ("detect", "MODEL", "--text", "short.txt", "--split", "odd"),
            "odd of 1 windows or images leaves none",
        ),
        (("detect", "./absent"), "./absent is not a folder"),
        (("detect", "BARE"), "has no tokenizer among its files"),
        (
            ("calibrate", "MODEL", "--text", "short.txt", "--sites", "empty.txt/sites.safetensors"),
            "cannot write",
        ),
    ],
)
def test_a_refusal_is_a_line_on_stderr(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("a short text")
    planted("llama").save_pretrained("bare")
    places = {"MODEL": str(llama), "BARE": "bare"}
    result = run(
        *(places.get(argument, argument) for argument in arguments), *CPU, "--json", code=1
    )
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("detekt",),
        ("detect",),
        ("detect", "x", "--length", "1"),
        ("detect", "x", "--batch-size", "0"),
        ("detect", "x", "--bos", "maybe"),
        ("detect", "x", "--min-ratio", "-1"),
        ("eval", "x", "--dtype", "int8"),
        ("eval", "x", "--nonsense"),
        ("detect", "x", "--max-images", "0"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, code=2).stdout == "" or arguments == ()


def test_exit_codes_of_the_installed_command(tmp_path: Path) -> None:
    command = str(Path(sys.executable).parent / "biassurgery")

    def execute(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )

    done = execute("list", "--json")
    refused = execute("detect", "./absent", "--json")
    wrong = execute("detect", "--nonsense")
    assert (done.returncode, refused.returncode, wrong.returncode) == (0, 1, 2)
    assert json.loads(done.stdout)["families"]
    assert done.stderr == ""
    assert refused.stdout == wrong.stdout == ""
    assert (
        refused.stderr
        == "error: model: ./absent is not a folder; give one with config.json and weights, or a"
        " name.\n"
    )


# Images


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A random timm model and a few labelled images."""
    import timm
    from safetensors.torch import save_file

    from tests.data.test_loading import paint, write_table

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images")
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    for shade in range(6):
        paint(folder / f"{shade}.png", 40 * shade)
    write_table(folder, [{"file": f"{shade}.png", "class_index": shade} for shade in range(6)])
    return "test_vit", "--weights", folder / "vit.safetensors", "--images", folder, *CPU


def test_images(sample: tuple[object, ...], tmp_path: Path) -> None:
    found = run_json("detect", *sample, "--split", "odd", "--max-images", 2, "--batch-size", 1)
    assert found["data"] == {"source": str(sample[4]), "images": 2, "split": "odd"}
    assert found["origin"]["roles"][-1] == "patch"
    low = ("--min-magnitude", 0, "--min-ratio", 3, "--sites", tmp_path / "sites.safetensors")
    assert len(run_json("calibrate", *sample, *low)["sites"]) > 0
    results = run_json("eval", *sample, "--sites", low[-1], "--mode", "set_zero")["results"]
    assert [row["mode"] for row in results] == ["original", "set_zero"]
    assert all(row["top1"] * 6 == pytest.approx(round(row["top1"] * 6)) for row in results)


def test_image_models_of_transformers(tmp_path: Path) -> None:
    """A folder with a classifier and its image processor: the same numbers as with the library."""
    import transformers as tf

    from tests.data.test_loading import paint, write_table

    model = vision.planted("vit")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor: Any = tf.ViTImageProcessor(size={"height": IMAGE, "width": IMAGE})
    processor.save_pretrained(folder)
    for shade in range(4):
        paint(tmp_path / f"{shade}.png", 60 * shade)
    write_table(
        tmp_path, [{"file": f"{shade}.png", "class_index": shade % 2} for shade in range(4)]
    )
    pixels = torch.stack(
        [
            processor(images=Image.open(tmp_path / f"{shade}.png"), return_tensors="pt")[
                "pixel_values"
            ][0]
            for shade in range(4)
        ]
    )

    found = run_json("detect", folder, "--images", tmp_path, *CPU)
    wanted = bs.detect(model, pixels, progress=False)
    assert [layer["median"] for layer in found["layers"]] == pytest.approx(
        [layer.median for layer in wanted.layers]
    )
    assert (LAYER, CHANNEL) in {(site["layer"], site["channel"]) for site in found["sites"]}
    assert run_json("detect", folder, *CPU)["data"]["source"].startswith("packaged photographs")

    saved = tmp_path / "sites.safetensors"
    run_json("calibrate", folder, "--images", tmp_path, *CPU, "--sites", saved)
    results = run_json(
        "eval", folder, "--images", tmp_path, *CPU, "--sites", saved, "--mode", "set_zero"
    )["results"]
    labels = torch.tensor([0, 1, 0, 1])
    assert results[0]["top1"] == bs.top1_accuracy(model, [(pixels, labels)])
    with bs.patched(model, "set_zero", sites=bs.Sites.load(saved)):
        assert results[1]["top1"] == bs.top1_accuracy(model, [(pixels, labels)])


def test_images_refuse_what_is_for_text(sample: tuple[object, ...]) -> None:
    assert "reads images; give --images" in run("detect", *sample, "--bos", "no", code=1).stderr
    assert "reads images; give --images" in run("detect", *sample, "--length", 8, code=1).stderr


def test_accuracy_needs_labels(sample: tuple[object, ...], tmp_path: Path) -> None:
    from tests.data.test_loading import paint

    paint(tmp_path / "a.png", 9)
    result = run(
        "eval", *sample[:3], "--images", tmp_path, "--sites", "absent.safetensors", *CPU, code=1
    )
    assert "absent.safetensors" in result.stderr
    bs.Sites([bs.Site(0, 0, "patch", 1.0)]).save(tmp_path / "sites.safetensors")
    result = run(
        "eval",
        *sample[:3],
        "--images",
        tmp_path,
        "--sites",
        tmp_path / "sites.safetensors",
        *CPU,
        code=1,
    )
    assert "top-1 accuracy needs labels" in result.stderr
    assert "1000 classes" in result.stderr


# Trained models


@pytest.mark.skipif(not (VIT.is_file() and IMAGES.is_dir()), reason=ABSENT)
def test_a_trained_vision_transformer(tmp_path: Path) -> None:
    common = ("vit_tiny_patch16_224", "--weights", VIT, "--images", IMAGES, *CPU)
    saved = run_json(
        "calibrate", *common, "--split", "even", "--sites", tmp_path / "sites.safetensors"
    )
    first = saved["sites"][0]
    assert (first["layer"], first["channel"], first["role"]) == (7, 41, "patch")
    assert {site["channel"] for site in saved["sites"]} == {41}
    assert first["mean"] == pytest.approx(-471, abs=20)
    assert first["count"] == pytest.approx(400, abs=8)  # the four corners of 100 images

    found = run_json("eval", *common, "--split", "odd", "--sites", tmp_path / "sites.safetensors")
    top1 = {row["mode"]: row["top1"] for row in found["results"]}
    assert found["data"]["images"] == 100
    assert top1["original"] == pytest.approx(0.86, abs=0.011)
    assert top1["set_zero"] == pytest.approx(0.68, abs=0.021)
    assert top1["set_mean"] == pytest.approx(top1["original"], abs=0.011)
    assert top1["zero_random"] == pytest.approx(top1["original"], abs=0.011)


@pytest.mark.skipif(not VIT.is_file(), reason=ABSENT)
def test_detection_names_block_and_channel_from_packaged_photographs() -> None:
    found = run_json("detect", "vit_tiny_patch16_224", "--weights", VIT, *CPU)
    assert found["data"]["source"].startswith("packaged photographs")
    assert {(site["layer"], site["channel"]) for site in found["sites"]} >= {(7, 41)}
    assert [layer["layer"] for layer in found["layers"] if layer["top"][0] > 200] == [
        7,
        8,
        9,
        10,
        11,
    ]


@pytest.mark.skipif(not STORIES.is_dir(), reason=ABSENT)
def test_a_trained_language_model_without_massive_activations(tmp_path: Path) -> None:
    options = (
        STORIES,
        "--text",
        SHARED / "text" / "tinystories_200k.txt",
        "--max-windows",
        4,
        "--length",
        128,
        *CPU,
    )
    assert run_json("calibrate", *options, "--sites", tmp_path / "sites.safetensors")["sites"] == []
    result = run("eval", *options, "--sites", tmp_path / "sites.safetensors", code=1)
    assert "there is nothing to change, for the sites are empty" in result.stderr


# Tables


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.44421, "0.4442"),
        (3.3541, "3.354"),
        (86.0, "86.00"),
        (-471.23, "-471.2"),
        (9871.4, "9,871"),
        (123456.7, "123,457"),
        (1.5e9, "1.500e+09"),
        (2.5e-6, "2.500e-06"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert render.number(value) == shown


def test_a_long_table_of_sites_is_cut() -> None:
    sites = bs.Sites(
        [
            bs.Site(layer, 3, "start", 1000.0 + layer, 1.0, 5, margin=7.0, cluster=layer % 2)
            for layer in range(60)
        ]
    )
    text = str(sites)
    rows = [line.split() for line in text.splitlines() if "start" in line]
    assert len(rows) == 40
    assert rows[0] == ["0", "3", "start", "1,000", "1.000", "5", "7.000x"]
    assert rows[1][2:5] == ["start,", "level", "2"]
    assert "and 20 more, up to layer 59" in text
    assert "more" not in str(sites[:40])
    assert str(bs.Sites()) == "No massive activations."


def test_detection_says_what_it_found() -> None:
    found = bs.detect(planted("llama"), [torch.tensor([[0, 5, 6, 1, 9]])])
    text = str(found)
    assert (
        text.index("Magnitudes at each block's output")
        < text.index("Tokens with massive activations")
        < text.index("margin")
    )
    assert "means over 1 sequences, 5 tokens" in text
    roles = [line.split() for line in text.splitlines() if "%" in line]
    assert roles[0] == [str(LAYER), "start", "1", "50.0", "%"]
