"""`calibrate_registers`: the mean register tokens at the input of every block, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.devices import check_loaded
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host, Tower, find_host, first_register
from biassurgery.adapters.scale import scale_of
from biassurgery.data.batches import Batch, as_batches
from biassurgery.errors import BadOption, NonFiniteActivation
from biassurgery.findings.register_means import RegisterMeans
from biassurgery.measure.checkpoint import checkpointed
from biassurgery.measure.observe import check_ran, observers
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step
from biassurgery.ops.moments import moments
from biassurgery.surgery.edit import attached


def calibrate_registers(
    model: nn.Module,
    images: Batch | Iterable[Batch],
    *,
    resume: RegisterMeans | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    tower: Tower | None = None,
    group: Group = None,
) -> RegisterMeans:
    """Mean and spread of the register tokens, and of [CLS], over images.

    For `patch_model(model, "fix_registers", means=...)`. Read in evaluation mode, without
    gradients, once; memory does not grow with the number of images. Under `torch.distributed` every
    rank reads its own images and all get the sum. Source: Sun et al. 2024, section 5.2, which takes
    10,000 images.

    Args:
        model: a vision transformer with registers.
        images: tensors `pixel_values` (B, C, H, W), dicts of the model's arguments, or pairs with
            labels.
        resume: an earlier result on other images, to be added to.
        checkpoint: a file in which the sums are kept, so that a killed pass goes on where it was,
            to the same numbers; see docs/calibration.md. None: nothing is kept.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        tower: of a model of images and text.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        UnsupportedModel: it has no registers.
        BadBatch, NonFiniteActivation, Incompatible: see their messages; the model is as it
            was.
        BadOption, FileError: also if `checkpoint` cannot be used, or is of another pass.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("calibrate_registers", model, group) as ranks:
        host = find_host(model, tower)
        first_register(host)
        check_loaded(host)
        if resume is not None and not isinstance(resume, RegisterMeans):
            raise BadOption(
                f"resume: {type(resume).__name__} is not RegisterMeans; pass what an earlier"
                " calibrate_registers() returned."
            )
        sums = _Sums(host)
        checked = ranks.apart(as_batches(host, images))
        kept = checkpointed(checked, checkpoint, "calibrate_registers", host, sums, batches=images)
        means = ranks.total(_measure(host, kept, progress, sums))
    return means if resume is None else resume + means


class _Sums:
    """Sums, over images, of the tokens before the patches at the input of each block.

    Attributes:
        of: by layer (2, tokens, D) float64 on its device: of the values and of their squares.
        images: by layer, how many it has read.
    """

    def __init__(self, host: Host) -> None:
        registers = sum(role.startswith("register:") for role in host.roles)
        self.tokens = first_register(host) + registers
        self.of: dict[int, Tensor] = {}
        self.images = Counter[int]()

    def see(self, layer: int, hidden: Tensor) -> None:
        prefix = hidden[:, : self.tokens].double()
        sums = torch.stack([prefix.sum(0), prefix.square().sum(0)])
        self.of[layer] = self.of[layer].to(sums.device) + sums if layer in self.of else sums
        self.images[layer] += len(hidden)

    def state(self) -> dict[str, Any]:
        return {"of": self.of, "images": self.images}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.of = state["of"]
        self.images = Counter(state["images"])


def _measure(
    host: Host, images: Iterable[dict[str, Any]], progress: bool | None, sums: _Sums
) -> RegisterMeans:
    first = first_register(host)
    with reading(host.model), attached(observers(host, sums.see, "input")):
        for batch in with_bar(in_step(images, host.root), "calibrating", progress):
            host.adapter.run(host.model, batch)
    count = max(sums.images.values(), default=0)
    check_ran(host, [layer for layer, images in sums.images.items() if images == count])
    layers = range(len(host.blocks))
    totals, squares = torch.stack([sums.of[layer].cpu() for layer in layers], 1)
    mean, std = moments(totals, squares, count)
    if not mean.isfinite().all():
        raise NonFiniteActivation(
            f"images: the registers hold NaN or infinity; {what_to_do(host)}."
        )
    cls = mean[:, 0] if host.roles[0] == "cls" else None
    return RegisterMeans(
        mean[:, first:], std[:, first:], cls, count, host.architecture, scale_of(host)
    )
