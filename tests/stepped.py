"""A tiny decoder whose massive activations grow block by block exactly as a table says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from tests import models
from tests.models import KEYS

# what the block of a layer adds to a channel at a token: (layer, token id, channel) -> amount
Steps = dict[tuple[int, int, int], float]


class Step(nn.Module):
    """In the place of an MLP: adds amounts at the tokens that an embedding channel names.

    Args:
        amounts: (token id, channel) -> amount.
        remade: (token id, channel) -> amount, added only where the channel is nearly 0, as a model
            that makes its value again.
    """

    def __init__(
        self, amounts: dict[tuple[int, int], float], remade: dict[tuple[int, int], float]
    ) -> None:
        super().__init__()
        self.amounts = amounts
        self.remade = remade

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for (token, channel), amount in self.amounts.items():
            out[..., channel] += amount * (x[..., KEYS[token]] > 0)
        for (token, channel), amount in self.remade.items():
            is_small = x[..., channel].abs() < 0.5
            out[..., channel] += amount * ((x[..., KEYS[token]] > 0) & is_small)
        return out


def stepped(steps: Steps, remade: Steps | None = None) -> Any:
    """A decoder like LLaMA, of 5 blocks, whose MLPs add what `steps` says and nothing else."""
    model = models.planted("llama")
    channels = sorted({channel for _, _, channel in (*steps, *(remade or {}))})
    with torch.no_grad():
        model.get_input_embeddings().weight[:, channels] = 0.0
        for layer, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight[channels] = 0.0
            block.mlp = Step(_at(layer, steps), _at(layer, remade or {}))
    return model


def _at(layer: int, steps: Steps) -> dict[tuple[int, int], float]:
    return {(token, channel): x for (at, token, channel), x in steps.items() if at == layer}


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Every block's output (B, T, D), float64, patches included."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: seen.append((out if isinstance(out, Tensor) else out[0]).double())
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def standing(model: Any, ids: Tensor) -> list[tuple[int, int, float]]:
    """(layer, channel, largest) of all that meets the definition, by sorting."""
    found = []
    for layer, states in enumerate(outputs(model, ids)):
        magnitudes = states.abs()
        medians = magnitudes.flatten(1).sort(1).values
        middle = medians[:, (medians.shape[1] - 1) // 2]
        limits = (1000 * middle).clamp(min=100)[:, None, None]
        meets = magnitudes.where(magnitudes > limits, 0).amax((0, 1))
        found += [(layer, c, meets[c].item()) for c in meets.nonzero()[:, 0].tolist()]
    return found


def places(sites: bs.Sites) -> set[tuple[int, int]]:
    """The (layer, channel) of the sites."""
    return {(site.layer, site.channel) for site in sites}


@contextmanager
def counted_rows(model: Any) -> Iterator[list[int]]:
    """How many sequences each forward of the model's body reads."""
    rows: list[int] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda _, __, out: rows.append((out if isinstance(out, Tensor) else out[0]).shape[0])
    )
    try:
        yield rows
    finally:
        hook.remove()
