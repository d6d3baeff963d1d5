"""Test-time registers by forward hooks, one image at a time, on a model without patches."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.findings.register_neurons import RegisterNeuron
from tests.models import (
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PATCH,
)
from tests.state import output_of

NEURONS = {0: [3, 7], 2: [5, 0, 31], LAYERS - 1: [12]}
TOLERANCE = 1e-11  # float64


def neurons_of(model: Any, neurons: dict[int, list[int]] | None = None) -> bs.RegisterNeurons:
    """Hand-made register neurons for a model."""
    host = find_host(model)
    found = tuple(
        RegisterNeuron(layer, neuron, 1.0)
        for layer, some in (neurons or NEURONS).items()
        for neuron in some
    )
    return bs.RegisterNeurons(found, host.architecture, len(host.blocks), host.width, 1, 10.0, 1, 1)


def random_vit(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small timm ViT in which every part has an effect."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        **{
            "img_size": IMAGE,
            "patch_size": PATCH,
            "embed_dim": HIDDEN,
            "depth": LAYERS,
            "num_heads": HEADS,
            "num_classes": 5,
        }
        | options
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.12)
    return model.to(dtype)


def by_hooks(
    model: Any,
    blocks: list[nn.Module],
    linears: list[nn.Module],
    image: Tensor,
    neurons: dict[int, list[int]],
    position: int,
) -> Tensor:
    """The output for one image (1, 3, H, W), by forward hooks on a model that nothing is patched
    on.
    """

    def add(_: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        longer = torch.cat(
            [
                hidden[:, :position],
                torch.zeros(1, 1, hidden.shape[-1], dtype=hidden.dtype),
                hidden[:, position:],
            ],
            dim=1,
        )
        return (
            ((longer, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": longer})
        )

    def drop(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        shorter = torch.stack(
            [token for index, token in enumerate(hidden[0]) if index != position]
        )[None]
        return shorter if isinstance(output, Tensor) else (shorter, *output[1:])

    def move(some: list[int], args: Any) -> Any:
        x = args[0].clone()
        for neuron in some:
            values = x[0, :, neuron].tolist()
            x[0, :, neuron] = 0.0
            x[0, position, neuron] = max(values, key=abs)
        return (x, *args[1:])

    hooks = [
        blocks[0].register_forward_pre_hook(add, with_kwargs=True),
        blocks[-1].register_forward_hook(drop),
    ]
    hooks += [
        linears[layer].register_forward_pre_hook(lambda _, args, some=some: move(some, args))
        for layer, some in neurons.items()
    ]
    output = output_of(model, image)
    for hook in hooks:
        hook.remove()
    return output


def reference(
    model: Any, batch: Tensor, neurons: dict[int, list[int]] | None = None, position: int = 1
) -> Tensor:
    """The outputs of a timm ViT, image by image."""
    linears = [block.mlp.fc2 for block in model.blocks]
    return torch.cat(
        [
            by_hooks(model, list(model.blocks), linears, image, neurons or NEURONS, position)
            for image in batch.split(1)
        ]
    )


def pickle_and_back(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
