"""From what users have (tensors, dicts, pairs) to the dicts of tensors that an adapter runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host
from biassurgery.adapters.unknown import image_tower
from biassurgery.errors import BadBatch, warn

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
IGNORED = -100  # the label of a token that does not count, as in transformers
MAIN = {"text": "input_ids", "image": "pixel_values", "audio": "input_features"}
_OTHER = {
    "input_ids": ("pixel_values",),
    "pixel_values": ("input_ids", "attention_mask", "position_ids", "token_type_ids"),
}


def as_batches(host: Host, batches: Batch | Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Yield checked batches on the model's device.

    Args:
        host: the model.
        batches: one batch or an iterable of them; a batch is a tensor (`input_ids` (B, T) int64, or
            `pixel_values` (B, C, H, W), or of sound `input_features` (B, mels, frames)), a dict of
            the model's own arguments (token ids by the
            host's name for them, or as `input_ids`), or a pair whose first element is one of
            these.

    Raises:
        BadBatch: none at all, or one that is empty, all padding, or of another form.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise BadBatch(
            f"batches: {type(batches).__name__} is not iterable; give a list of tensors or dicts,"
            " or a data loader."
        )
    warn_of_repeats(batches)
    device = input_device(host.model)
    empty = True
    for batch in batches:
        empty = False
        yield as_inputs(host, batch, device)
    if empty:
        raise BadBatch("batches: there are none; give at least one batch.")


def warn_of_repeats(batches: Any) -> None:
    """Warn where a `DistributedSampler` gives some samples to two ranks, to give all as many."""
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        repeats = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
        if repeats > 0:
            warn(
                f"batches: the DistributedSampler repeats {repeats} of its"
                f" {sampler.total_size - repeats} samples, to give every rank as many, and they"
                " count twice; torch.utils.data.Subset(dataset, range(rank, len(dataset), world))"
                " repeats none.",
            )


def as_inputs(host: Host, batch: Batch, device: torch.device) -> dict[str, Any]:
    """One checked batch as a dict on `device`, its main input under this library's name."""
    main = MAIN[host.adapter.modality]
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        batch = _from_pair(main, *batch[:2])
    if isinstance(batch, Tensor):
        batch = {main: batch}
    if not isinstance(batch, Mapping):
        raise BadBatch(
            f"batches: a batch is a {type(batch).__name__}; give a tensor ({main}), a dict of the"
            " model's arguments, or a pair of one of these and labels."
        )
    # An argument that is None is one that is not given, as in the models themselves.
    arguments = {name: value for name, value in batch.items() if value is not None}
    batch = host.adapter.canonical(arguments)
    # A processor's batch is for both towers.
    if host.tower is not None or main == "pixel_values":
        batch = {name: value for name, value in batch.items() if name not in _OTHER[main]}
    name = main
    if main == "input_ids" and main not in batch and "inputs_embeds" in batch:
        name = "inputs_embeds"
    value = batch.get(name)
    if not isinstance(value, Tensor):
        raise BadBatch(
            f"batches: a batch has the keys {sorted(batch)} but no tensor {main!r}; add it."
        )
    _check_form(host, name, value)
    if name == "input_ids":
        _check_vocabulary(host, value)
    mask = batch.get("attention_mask")
    if mask is not None and main == "input_ids":
        _check_mask(mask, value)
    # From pinned memory a copy to a GPU runs beside the forward before; in the other direction that
    # would be unsafe.
    to_gpu = device.type == "cuda"
    return {
        name: item.to(device, non_blocking=to_gpu) if isinstance(item, Tensor) else item
        for name, item in batch.items()
    }


def _check_form(host: Host, name: str, value: Tensor) -> None:
    shape = tuple(value.shape)
    if not value.numel():
        raise BadBatch(f"batches: a batch is empty, {name} has shape {shape}; leave it out.")
    axes = getattr(host.adapter, "pixel_axes", (4,))
    if name == "pixel_values" and (value.dim() not in axes or not value.is_floating_point()):
        raise BadBatch(
            f"batches: pixel_values is {value.dtype} of shape {shape}; give normalised floats (B,"
            " C, H, W)."
        )
    if name == "input_features" and (value.dim() != 3 or not value.is_floating_point()):
        raise BadBatch(
            f"batches: input_features is {value.dtype} of shape {shape}; give floats (B, mels,"
            " frames), as the model's feature extractor makes them."
        )
    if name == "inputs_embeds" and (value.dim() != 3 or not value.is_floating_point()):
        raise BadBatch(
            f"batches: inputs_embeds is {value.dtype} of shape {shape}; give floats (B, T, D)."
        )
    if name == "input_ids" and value.dtype not in (torch.int64, torch.int32):
        reason = image_tower(host.root) if value.dim() == 4 else None
        if reason is not None:
            raise BadBatch(f"batches: {shape} are images, but {reason}; give token ids (B, T).")
        raise BadBatch(
            f"batches: input_ids is {value.dtype} of shape {shape}; give token ids (B, T) int64, or"
            " a dict with inputs_embeds."
        )
    if name == "input_ids" and value.dim() != 2:
        raise BadBatch(
            f"batches: input_ids has shape {shape}; give (B, T) int64. A list of batches needs one"
            " more pair of brackets."
        )


def _from_pair(main: str, first: Any, second: Any = None) -> Any:
    """The batch in a pair; labels of tokens go along, for perplexity heeds them.

    A mask in the place of labels would be lost, so it is refused.
    """
    if (
        main != "input_ids"
        or not isinstance(first, Tensor)
        or not isinstance(second, Tensor)
        or second.shape != first.shape
    ):
        return first
    if not second.is_floating_point() and ((second == 0) | (second == 1)).all():
        raise BadBatch(
            "batches: the second tensor of a pair, where labels are expected, looks like a mask;"
            " give a dict with input_ids and attention_mask."
        )
    return {main: first, "labels": second}


def _check_vocabulary(host: Host, ids: Tensor) -> None:
    """Refuse ids that have no embedding: on a GPU a look-up of one makes every later call fail."""
    size = host.adapter.vocabulary(host.model)
    low = int(ids.min())
    high = int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise BadBatch(
            f"batches: token {low if low < 0 else high} is not among the {size} of the model; is"
            " this its own tokenizer?"
        )


def _check_mask(mask: Any, value: Tensor) -> None:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or mask.shape[0] != value.shape[0]
        or mask.shape[1] < value.shape[1]
    ):
        raise BadBatch(
            f"batches: attention_mask has shape {shape}, but the tokens have"
            f" {tuple(value.shape[:2])}; give (B, T), 1 for each real token and 0 for padding."
        )
    if not mask.any():
        raise BadBatch(
            "batches: attention_mask is 0 everywhere, so a batch is all padding; leave it out."
        )
