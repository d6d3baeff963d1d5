"""What the command line refuses, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import CPU, run
from tests.models import planted


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
        == "error: model: ./absent is not a folder; give one with config.json and weights, a GGUF"
        " file, or a name.\n"
    )
