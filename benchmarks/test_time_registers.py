"""Test-time registers (Jiang et al. 2025) on a trained ViT-Ti/16: accuracy, and where the outlier
tokens go, by number of neurons.

    python benchmarks/test_time_registers.py WEIGHTS IMAGES     # about three minutes on one core

WEIGHTS: a state dict of timm's `vit_tiny_patch16_224` (safetensors). IMAGES: a folder of images
    with `labels.csv` (file, class_index).
Neurons found on every second image are used on the others, and the other way round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import biassurgery as bs
from biassurgery.data.reading import ImageBatches, image_files
from biassurgery.findings.register_neurons import RegisterNeuron
from biassurgery.findings.render import table

COUNTS = (1, 2, 3, 5, 10, 20, 50, 100)
# of this model's massive activations, and the tokens that have them
CHANNEL = 41
CORNERS = (1, 14, 183, 196)


@dataclass(frozen=True)
class Result:
    """What a model does on some images: right answers; means over images of the largest patch norm
    and magnitude in `CHANNEL`, of the
    added token's norm and value there, all at the output of the outlier layer; and the share of
    attention, in the layers behind, that tokens give to the added token, or to the four corners
    where there is none.
    """

    right: float
    patch_norm: float
    patch_value: float
    token_norm: float
    token_value: float
    attention: float

    def __add__(self, other: Result) -> Result:
        return Result(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


def measured(model: Any, batches: list[tuple[Tensor, Tensor]], layer: int, added: bool) -> Result:
    total = Result(0, 0, 0, 0, 0, 0)
    behind = list(range(layer + 1, len(model.blocks)))
    for images, labels in batches:
        with (
            torch.no_grad(),
            bs.record(model, "block_output", [layer]) as hidden,
            bs.record(model, "sink_mass", behind, sink_tokens=[1] if added else CORNERS) as mass,
        ):
            right = (model(images).argmax(1) == labels).sum().item()
        tokens = hidden["block_output"][layer]
        patches = tokens[:, 2 if added else 1 :]
        token = tokens[:, 1] if added else torch.full_like(tokens[:, 1], torch.nan)
        share = torch.stack([mass["sink_mass"][each] for each in behind]).mean((0, 2, 3))  # (B,)
        total += Result(
            right,
            patches.norm(dim=-1).amax(1).sum().item(),
            patches[..., CHANNEL].abs().amax(1).sum().item(),
            token.norm(dim=-1).sum().item(),
            token[:, CHANNEL].sum().item(),
            share.sum().item(),
        )
    return total


@contextmanager
def zeroed(model: Any, neurons: bs.RegisterNeurons) -> Iterator[None]:
    """The register neurons are 0 at all tokens, and there is no other token: the paper's
    control.
    """
    hooks = []
    for layer, some in neurons.by_layer().items():
        index = torch.tensor(some)
        hooks.append(
            model.blocks[layer].mlp.fc2.register_forward_pre_hook(
                lambda _, args, i=index: (args[0].index_fill(-1, i, 0.0),)
            )
        )
    yield
    for hook in hooks:
        hook.remove()


def at_random(neurons: bs.RegisterNeurons, hidden: int) -> bs.RegisterNeurons:
    """As many other neurons of the same layers."""
    torch.manual_seed(0)
    drawn = []
    for layer, some in neurons.by_layer().items():
        others = torch.tensor([n for n in range(hidden) if n not in some])
        drawn += [
            RegisterNeuron(layer, n, 0.0)
            for n in others[torch.randperm(len(others))[: len(some)]].tolist()
        ]
    return replace(neurons, neurons=tuple(drawn))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path)
    options = parser.parse_args()
    import timm
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    model: Any = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(options.weights))
    files = image_files(options.images, model.num_classes)
    halves: list[list[Any]] = [list(ImageBatches(files[start::2], model, 25)) for start in (0, 1)]
    found = [bs.find_register_neurons(model, half, count=max(COUNTS)) for half in halves]
    console = Console(width=140)
    console.print(
        "from the even images", found[0].first(10), "from the odd images", found[1].first(10)
    )

    def patch(neurons: bs.RegisterNeurons) -> AbstractContextManager[Any]:
        return bs.patched(model, "test_time_registers", neurons=neurons)

    rows: list[tuple[str, Any, bool]] = [("original", lambda _: nullcontext(), False)]
    rows += [(f"{k}", lambda n, k=k: patch(n.first(k)), True) for k in COUNTS]
    rows += [
        (
            f"{k} at random",
            lambda n, k=k: patch(at_random(n.first(k), model.blocks[0].mlp.fc2.in_features)),
            True,
        )
        for k in (3, 10)
    ]
    rows += [
        (f"{k} zeroed, no register", lambda n, k=k: zeroed(model, n.first(k)), False)
        for k in (1, 3, 10)
    ]
    lines = table(
        "Test-time registers",
        "neurons",
        "top-1 (odd)",
        "top-1 (all)",
        "patch norm",
        f"patch ch {CHANNEL}",
        "register norm",
        f"register ch {CHANNEL}",
        "attention",
        left=("neurons",),
    )
    for name, change, added in rows:
        results = []
        for half, neurons in ((halves[1], found[0]), (halves[0], found[1])):
            with change(neurons):
                results.append(measured(model, half, neurons.outlier_layer, added))
        both = results[0] + results[1]
        images = len(files)
        means = [value / images for value in vars(both).values()][1:]
        lines.add_row(
            name,
            f"{results[0].right / len(files[1::2]):.1%}",
            f"{both.right / images:.1%}",
            *("" if value != value else f"{value:.1f}" for value in means[:4]),
            f"{means[4]:.1%}",
        )
    console.print(lines)


if __name__ == "__main__":
    main()
