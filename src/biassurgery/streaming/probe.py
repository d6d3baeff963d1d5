"""Which rotation the keys of each layer carry: tried on the model, for configs do not tell it."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.reading import reading
from biassurgery.streaming.rotation import Rotation

FARTHEST = 1021  # position at which keys are compared with those at 0
MOVING = ("dynamic", "longrope")  # frequencies that change with the length of the sequence


def rotations_of(host: Host) -> list[Rotation]:
    """How the keys of each layer move from one position to another.

    The model reads one token at position 0 and at a later one. It attends to itself alone, so that
    its keys differ by their rotation only.

    Raises:
        UnsupportedModel: keys hold their position in another way (learned positions), or there is
            more in a cache than keys and values.
    """
    model = host.model
    kind = type(host.model).__name__
    if host.adapter.recurrent(model):
        raise UnsupportedModel(
            f"model: {kind} keeps a recurrent state, from which no token can be evicted; use a"
            " decoder whose layers all attend."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        if host.architecture != "mpt":
            raise UnsupportedModel(
                f"model: {kind} takes no position_ids, so how its keys hold positions cannot be"
                " seen; use a model with rotary positions."
            )
        return [Rotation(None) for _ in host.blocks]  # ALiBi
    at_zero, later, distance = _keys(host)
    candidates = _candidates(model)
    rotations: list[Rotation] = []
    for layer, (before, after) in enumerate(zip(at_zero, later)):
        # Where layers are known to be alike, the first one tells: an explicit bias in one tells
        # positions apart in the next by more than a rotation.
        alike = bool(layer) and host.adapter.uniform
        rotation = rotations[0] if alike else _matching(candidates, before, after, distance)
        if rotation is None:
            raise UnsupportedModel(
                f"model: the keys of layer {layer} of {kind} at position {distance} are not those"
                " at position 0 after a rotation (learned positions, or a rotation that is not"
                " known), so they cannot move inside a cache; use a model with rotary positions."
            )
        rotations.append(rotation)
    return rotations


def _keys(host: Host) -> tuple[list[Tensor], list[Tensor], int]:
    """The keys (H, 1, d) of one token at position 0 and at a later one, and that position.

    One tensor a layer.
    """
    from transformers import DynamicCache

    device = input_device(host.model)
    distance = min(FARTHEST, host.adapter.context(host.model) or FARTHEST + 1) - 1
    ids = torch.full((2, 1), (host.adapter.vocabulary(host.model) or 1) // 2, device=device)
    cache = DynamicCache()
    with reading(host.model, eager=False):
        host.model(
            input_ids=ids,
            position_ids=torch.tensor([[0], [distance]], device=device),
            **host.adapter.cache_arguments(host.model, cache),
        )
    keys: list[Tensor | None] = [getattr(layer, "keys", None) for layer in cache.layers]
    if len(keys) != len(host.blocks) or any(
        key is None or key.dim() != 4 or not key.any() for key in keys
    ):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} does not cache keys (B, H, T, d) in each of its"
            f" {len(host.blocks)} layers; use a decoder whose layers all attend."
        )
    at_zero = [key[0] for key in keys if key is not None]
    later = [key[1] for key in keys if key is not None]
    return at_zero, later, distance


def _candidates(model: nn.Module) -> list[Rotation]:
    """No rotation, and each set of frequencies in the model, in both layouts."""
    if any(getattr(module, "rope_type", None) in MOVING for module in model.modules()):
        raise UnsupportedModel(
            f"model: the rotary frequencies of {type(model).__name__} change with the length of the"
            f" sequence ({' or '.join(MOVING)}), so cached keys and new ones would not fit; load it"
            " with another rope_type."
        )
    frequencies = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]
    rotations = [
        Rotation(buffer, interleaved)
        for buffer in frequencies
        if buffer.dim() == 1
        for interleaved in (False, True)
    ]
    return [Rotation(None), *rotations]


def _matching(
    candidates: list[Rotation], before: Tensor, after: Tensor, distance: int
) -> Rotation | None:
    """The candidate that turns one into the other, within the accuracy of the dtype."""
    tolerance = max(1e-3, 8 * torch.finfo(before.dtype).eps) * float(before.abs().max())
    # Channel by channel: one large key must not hide the others.
    size = before.float().abs().amax((0, 1)).clamp(min=1e-12)
    errors = {
        candidate: (candidate(before[None].float(), (distance,))[0] - after.float()).abs()
        for candidate in candidates
        if candidate.fits(before.shape[-1])
    }
    best = min(errors, key=lambda candidate: float((errors[candidate] / size).mean()))
    return best if float(errors[best].max()) <= tolerance else None
