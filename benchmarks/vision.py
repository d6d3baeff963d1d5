"""Speed of patched vision transformers, each as a ratio to the unpatched model in the same run.

    python benchmarks/vision.py [--quick] [--models timm] [--sizes 518] [--rows fix_registers]
    [--repeats 6] [--json FILE] python benchmarks/vision.py --device cuda --dtype bfloat16 [--way
    compiled | graphs]

One thread, inference. Every repeat runs all variants in turn, and a ratio is the median over
repeats of (variant / unpatched of that repeat); the row "unpatched again" is the noise. The models
are random, of the size of ViT-B; the first is DINOv2 with registers. nn.MultiheadAttention,
open_clip's, has a fast path in inference, which a changed one cannot take: it is part of the
unpatched model, and the row "without fast path" is the unpatched model with the fast path switched
off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import interleaved, one_thread, ratios, seconds
from torch import Tensor, nn
from ways import WAYS, captured, compiled, ready

import biassurgery as bs

WIDTH = 768
DEPTH = 12
HEADS = 12
REGISTERS = 4
CHANNELS = {3: 500.0, 7: -300.0}  # where `set_mean` writes, and what
TARGETS = {"fix_registers": 1.02, "attention_bias kv": 1.05}

Cells = dict[tuple[int, int], int]  # pixels of a side, images of a batch -> repeats
CPU: Cells = {(224, 1): 11, (224, 8): 3, (518, 1): 5, (518, 8): 3}
CUDA: Cells = {(224, 1): 51, (224, 64): 51, (518, 1): 51, (518, 64): 21}
QUICK: Cells = {(224, 1): 3}


def timm_vit(size: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size,
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        reg_tokens=REGISTERS,
        no_embed_class=True,
        init_values=1.0,
    )


def dinov2(size: int) -> nn.Module:
    import transformers as tf

    return tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(
            image_size=size,
            patch_size=14,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_register_tokens=REGISTERS,
        )
    )


def open_clip(size: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=size, patch_size=16, width=WIDTH, layers=DEPTH, heads=HEADS, mlp_ratio=4
    )


class Kind(NamedTuple):
    title: str
    build: Callable[[int], nn.Module]
    sizes: tuple[int, ...] = (224,)


KINDS = {
    "timm": Kind("timm, ViT-B/14 with 4 registers", timm_vit, (224, 518)),
    "dinov2": Kind("transformers, Dinov2WithRegisters, ViT-B/14", dinov2),
    "open_clip": Kind("open_clip, ViT-B/16 on nn.MultiheadAttention", open_clip),
}


def images(model: nn.Module, rows: int, size: int) -> Tensor:
    """(rows, 3, size, size) random pixels."""
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))
    return pixels.to(next(model.parameters()))


# What is run


def forward(model: Any, pixels: Tensor) -> Any:
    with torch.inference_mode():
        return model(pixels)


def recorded(model: Any, pixels: Tensor) -> Any:
    with bs.record(model, what=("sink_mass",)) as found:
        forward(model, pixels)
    return found


class Variant(NamedTuple):
    """One row: what is on the model while it runs, and how it runs."""

    patch: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    run: Callable[[Any, Tensor], Any] = forward


def registers_fixed(model: Any) -> AbstractContextManager[Any]:
    means = torch.randn(DEPTH, REGISTERS, WIDTH, generator=torch.Generator().manual_seed(0))
    return bs.patched(model, "fix_registers", means=bs.RegisterMeans(means))


def means_set(layers: str, model: Any) -> AbstractContextManager[Any]:
    """With a gate that all values pass, so that there is something to write in a random model; the
    cost does not depend on it.
    """
    sites = bs.Sites(
        bs.Site(layer, channel, "cls", mean, gate=0.0)
        for layer in range(DEPTH)
        for channel, mean in CHANNELS.items()
    )
    return bs.patched(model, "set_mean", sites=sites, layers=layers)


@contextmanager
def slow_path(model: Any) -> Iterator[Any]:
    """The model without the fast path of nn.MultiheadAttention."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


VARIANTS = {
    "unpatched": Variant(),
    "unpatched again": Variant(),
    "without fast path": Variant(slow_path),
    "fix_registers": Variant(registers_fixed),
    "set_mean, one block": Variant(partial(means_set, "first")),
    "set_mean, all blocks": Variant(partial(means_set, "all")),
    "attention_bias kv": Variant(
        lambda model: bs.patched(model, "attention_bias", kind="kv", init="normal")
    ),
    "instrument": Variant(lambda model: bs.patched(model, "instrument")),
    "record sink_mass": Variant(run=recorded),
}


def variants(name: str, way: str, rows: list[str]) -> dict[str, Variant]:
    """Those of `rows`, and the unpatched ones, that this model has; recording is eager."""
    absent = {"fix_registers"} if name == "open_clip" else {"without fast path"}
    if way != "eager":
        absent |= {"without fast path", "record sink_mass"}
    return {
        row: variant
        for row, variant in VARIANTS.items()
        if row not in absent and row in ("unpatched", "unpatched again", *rows)
    }


# How it is measured


def timed(
    name: str, cells: Cells, rows: list[str], device: str, dtype: torch.dtype, way: str
) -> dict[tuple[int, int], Any]:
    """Seconds and ratios of every row, by size and batch."""
    found: dict[tuple[int, int], Any] = {}
    for size in dict.fromkeys(size for size, _ in cells):
        torch.manual_seed(0)
        model = KINDS[name].build(size).eval().to(device, dtype)
        for batch in [batch for each, batch in cells if each == size]:
            pixels = images(model, batch, size)

            def timer(variant: Variant, model: nn.Module = model, pixels: Tensor = pixels) -> float:
                with ready(model, variant.patch, way) as m:
                    work = partial(variant.run, m, pixels)
                    return seconds(captured(work) if way == "graphs" else work, device)

            timers = {
                row: partial(timer, variant) for row, variant in variants(name, way, rows).items()
            }
            cold = (
                batch == 1 or way == "compiled" or device == "cuda"
            )  # one round is minutes at the largest input of a CPU
            times = interleaved(timers, cells[size, batch], warm_up=cold)
            found[size, batch] = ratios(times, "unpatched")
        compiled.cache_clear()
    return found


# Output


def table(name: str, times: dict[tuple[int, int], Any]) -> Any:
    from rich.table import Table

    shown = Table(
        "",
        *(f"{size} x {batch}" for size, batch in times),
        "target",
        title=f"{KINDS[name].title}: relative to the unpatched model, by pixels and images",
    )
    shown.columns[0].no_wrap = True
    rows = list(next(iter(times.values())))
    shown.add_row(
        "unpatched",
        *(f"{cell['unpatched']['seconds']:.3f} s" for cell in times.values()),
        "",
        end_section=True,
    )
    for row in rows[1:]:
        target = f"{TARGETS[row]:.2f}x" if row in TARGETS else ""
        shown.add_row(row, *(f"{cell[row]['ratio']:.3f}x" for cell in times.values()), target)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="224 pixels, one image, three repeats")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="pixels of a side, as far as a model is measured at them; 224 518",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="of every variant, at least two; fewer at larger inputs where it is not given",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        help="besides the unpatched model",
    )
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--way",
        choices=WAYS,
        default="eager",
        help="graphs: CUDA graphs; recording is measured eager only",
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    if arguments.way == "graphs" and arguments.device == "cpu":
        parser.error("--way graphs needs --device cuda")
    if arguments.repeats == 1:
        parser.error("--repeats 1 has no median; give two or more")
    from rich.console import Console

    every = QUICK if arguments.quick else CUDA if arguments.device == "cuda" else CPU
    results: dict[str, Any] = {}
    with one_thread():
        for name in arguments.models:
            cells = {
                (size, batch): arguments.repeats or repeats
                for (size, batch), repeats in every.items()
                if size in KINDS[name].sizes and size in (arguments.sizes or KINDS[name].sizes)
            }
            if cells:
                times = timed(
                    name,
                    cells,
                    arguments.rows,
                    arguments.device,
                    getattr(torch, arguments.dtype),
                    arguments.way,
                )
                results[name] = {
                    f"{size} px x {batch}": rows for (size, batch), rows in times.items()
                }
                Console().print(table(name, times))
    if arguments.json:
        setting = {
            name: getattr(arguments, name) for name in ("quick", "device", "dtype", "way")
        } | {"torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
