"""Reports of several models, and pictures of their first screens.

    python examples/gallery.py demo --out docs/gallery            # seconds
    python examples/gallery.py smollm2 stories260k --where stories260k=FOLDER --out gallery \\
        --pictures docs/pictures/gallery

A report is that of `biassurgery report`. `--where NAME=PLACE` says where the files of a model are,
as the command takes them: a folder, or "vit_tiny_patch16_224 --weights FILE --images FOLDER". A
picture is the first screen in a headless Chromium, 1,400 x 900 pixels.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import biassurgery

BIASSURGERY = Path(sys.executable).with_name("biassurgery")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What `biassurgery report` is given behind the model: the packaged checkpoint is too small for the
# paper's ratio of 1000, so `biassurgery demo` and its report state their own.
MODELS = {
    "demo": ("--min-ratio", "100"),
    "stories260k": (),
    "smollm2": (),
    "gemma3": (),
    "vit_ti": (),
}


def place_of(name: str, where: dict[str, str]) -> list[str]:
    """The model as the command line takes it."""
    if name in where:
        return where[name].split()
    if name == "demo":
        return [str(Path(biassurgery.__file__).parent / "assets" / "demo")]
    if name == "smollm2":
        fetched = subprocess.run([BIASSURGERY, "fetch", name], check=True, stdout=subprocess.PIPE)
        return [fetched.stdout.decode().split("\n")[-2]]
    raise SystemExit(f"{name}: say where it is: --where {name}=FOLDER")


def build(name: str, where: dict[str, str], out: Path) -> Path:
    """The report of one model."""
    page = out / f"{name}.html"
    command = [str(BIASSURGERY), "report", *place_of(name, where)]
    subprocess.run([*command, *MODELS[name], "-o", str(page)], check=True)
    return page


def picture(page: Path, to: Path, width: int = 1400, height: int = 900) -> None:
    """The first screen of a page as a PNG; scripts have five seconds of the page's time to draw."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium: not installed; `make browser` installs Debian's.")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                *FLAGS,
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "--virtual-time-budget=5000",
                f"--screenshot={to}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pages")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; none: no pictures")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=PLACE")
    arguments = parser.parse_args()
    where = dict(each.split("=", 1) for each in arguments.where)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        page = build(name, where, arguments.out)
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            picture(page, arguments.pictures / f"{name}.png")


if __name__ == "__main__":
    main()
