"""README's code runs as it stands, on the model that it names, and prints what README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from biassurgery.data.real_models import REAL_MODELS
from tests.real.conftest import FOLDERS, HOW

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
ABSENT = f"{REAL_MODELS['smollm2'].title} is not in the cache: {HOW['smollm2']}"


def numbers(text: str) -> dict[str, float]:
    """The values of the table of interventions, by mode."""
    rows = re.findall(r"(original|set_zero|set_mean|zero_random) +([\d,.]+)", text)
    return {mode: float(value.replace(",", "")) for mode, value in rows}


@pytest.mark.skipif(not FOLDERS["smollm2"].is_dir(), reason=ABSENT)
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = re.findall(r'^name = "([^"]+)"', README, re.M)
    hub = tmp_path / name  # a folder of that name is what `from_pretrained` takes first
    hub.parent.mkdir()
    hub.symlink_to(FOLDERS["smollm2"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed := io.StringIO()):
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
    (shown,) = re.findall(r"```\n(  mode .*?)```", README, re.S)
    wanted = numbers(shown)
    found = numbers(printed.getvalue())
    assert len(wanted) == 4
    assert found["set_zero"] == pytest.approx(wanted["set_zero"], rel=0.02)
    for mode in ("original", "set_mean", "zero_random"):
        assert found[mode] == pytest.approx(wanted[mode], rel=1e-3)
