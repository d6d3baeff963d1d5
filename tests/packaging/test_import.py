"""What importing the library costs."""

from __future__ import annotations

import subprocess
import sys


def test_an_import_is_cheap():
    code = (
        "import sys, biassurgery\nheavy = {'transformers', 'timm', 'open_clip', 'rich', 'typer',"
        " 'pandas', 'safetensors'} & set(sys.modules)\nassert not heavy,"
        " heavy\nbiassurgery.adapters.registry.adapters()\nheavy = {'transformers', 'timm',"
        " 'open_clip'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
