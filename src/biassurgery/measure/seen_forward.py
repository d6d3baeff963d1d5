"""One forward of a model, and all of it that tells whether two models are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import call, call_with
from biassurgery.adapters.registry import Host
from biassurgery.measure.observe import observed
from biassurgery.surgery.edit import Edit

EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclass
class Forward:
    """What was seen.

    Attributes:
        hidden: (B, T, D) float32, what each block returned.
        outputs: float32, what the model returned, by name.
        norms: the root mean square of what each norm read, by the module's name.
        peaks: the largest magnitude that went into or came out of a module without children, by
            its name.
        dtype: of the hidden states.
    """

    hidden: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def see_block(self, layer: int, hidden: Tensor) -> None:
        self.hidden.append(hidden.float())
        self.dtype = hidden.dtype

    def see_module(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        tensors = [
            tensor.detach()
            for tensor in (*inputs, output)
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point and tensor.numel()
        ]
        if tensors and epsilon_of(module) is not None:
            self.norms[name] = tensors[0].float().square().mean().sqrt().item()
        peak = max((tensor.abs().max().item() for tensor in tensors), default=0.0)
        self.peaks[name] = max(peak, self.peaks.get(name, 0.0))


def epsilon_of(module: nn.Module) -> str | None:
    """The attribute in which a norm keeps what it adds to a variance; None: it is no norm."""
    return next((n for n in EPSILONS if isinstance(getattr(module, n, None), float)), None)


def forward(host: Host, batch: Mapping[str, Any]) -> Forward:
    """Run a model on a batch and keep what is seen."""
    seen = Forward()
    with ExitStack() as undo:
        undo.enter_context(observed(host, seen.see_block))
        for name, module in host.model.named_modules():
            if not isinstance(module, Edit) and not any(True for _ in module.children()):
                hook = module.register_forward_hook(partial(seen.see_module, name))
                undo.callback(hook.remove)
        seen.outputs = dict(_tensors("", run(host, batch)))
    return seen


def run(host: Host, batch: Mapping[str, Any]) -> Any:
    """What the model, head included, returns for a batch; with the same random numbers each time.

    Masked autoencoders draw some.
    """
    model: Any = host.model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if host.adapter.modality == "image":
            return call_with(model, "pixel_values", batch)
        if hasattr(model, "encode_text"):  # open_clip's plain class is no module of text alone
            return model.encode_text(batch["input_ids"])
        return call(model, host.adapter.inputs(model, batch))


@contextmanager
def keeping_inputs(module: nn.Module | None, kept: list[Tensor]) -> Iterator[None]:
    """Within the block, what a module reads is added to a list."""
    if module is None:
        yield
        return
    hook = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        yield
    finally:
        hook.remove()


def _tensors(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in what a model returned, by name or place."""
    if isinstance(output, Tensor):
        if output.dtype.is_floating_point:
            yield name or "output", output.detach().float()
    elif isinstance(output, (tuple, list)):
        for index, item in enumerate(output):
            yield from _tensors(f"{name}{index}", item)
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from _tensors(f"{name}{key}", item)
