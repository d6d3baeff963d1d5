"""`biassurgery report`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from tests.cli.running import CPU, common, run, run_json
from tests.cli.test_text import windows
from tests.models import planted

pytest.importorskip("vl_convert", reason="needs vl-convert-python (the report extra)")


def table_of(page: Path) -> dict[str, list]:
    (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
    return {part["name"]: part["columns"] for part in json.loads(data)}


def test_a_report_of_a_text_model(llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    document = run_json("report", *common(llama), "-o", page, "--max-windows", 8)
    assert document["report"] == str(page)
    assert f"<title>{llama.name}</title>" in page.read_text()
    shown = table_of(page)
    rows = windows((llama / "text.txt").read_text())[:8]
    model = planted("llama")
    sites = bs.calibrate(model, rows[::2])
    with bs.patched(model, "set_zero", sites=sites):
        zero = bs.perplexity(model, rows[1::2])
    found = dict(zip(shown["interventions"]["mode"], shown["interventions"]["perplexity"]))
    assert found["set_zero"] == pytest.approx(zero, rel=1e-5)
    assert found["original"] == pytest.approx(bs.perplexity(model, rows[1::2]), rel=1e-5)
    assert "Measured on other data" in page.read_text()
    assert shown["tokens"]["position"][-1] == rows.shape[1] - 1


def test_windows_of_a_long_context_are_short(llama: Path, tmp_path: Path) -> None:
    """Many sequences rather than a few long ones, where no length is given."""
    folder = shutil.copytree(llama, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    page = ("-o", tmp_path / "page.html", "--max-windows", 2, *CPU)
    assert run_json("report", folder, *page)["data"]["length"] == 256
    assert run_json("report", folder, *page, "--length", 40)["data"]["length"] == 40


def test_a_report_that_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    result = run("report", *common(llama), "-o", tmp_path, "--max-windows", 2, code=1)
    assert "error: path: cannot write" in result.stderr


def test_an_image_model_has_no_text(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "text.txt").write_text("words")
    page = tmp_path / "page.html"
    model = ("test_vit", "--weights", tmp_path / "vit.safetensors", *CPU)
    result = run("report", *model, "--text", tmp_path / "text.txt", "-o", page, code=1)
    assert "reads images; give --images instead" in result.stderr
    assert result.stderr.count("error:") == 1
    assert not page.exists()


def test_a_text_model_has_no_images(llama: Path, tmp_path: Path) -> None:
    result = run("report", llama, "--images", tmp_path, *CPU, "-o", tmp_path / "r.html", code=1)
    assert "reads text; give --text" in result.stderr
