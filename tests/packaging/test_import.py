"""What importing the library costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_an_import_is_cheap():
    code = (
        "import sys, biassurgery\nheavy = {'transformers', 'timm', 'open_clip', 'rich', 'typer',"
        " 'pandas', 'safetensors'} & set(sys.modules)\nassert not heavy,"
        " heavy\nbiassurgery.adapters.registry.adapters()\nheavy = {'transformers', 'timm',"
        " 'open_clip'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_importing_the_command_line_is_cheap() -> None:
    import subprocess

    code = (
        "import sys, biassurgery.cli; print([name for name in ('transformers', 'timm', 'open_clip',"
        " 'pandas', 'PIL') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
