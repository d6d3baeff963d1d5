"""`calibrate_key_values`: what the start token of a sequence gives to attention, its mean key and value in every layer and head."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host, find_host
from biassurgery.attention.call import Call
from biassurgery.attention.edited import AttentionEdit, check_attention
from biassurgery.batches import Batch, as_batches
from biassurgery.devices import check_loaded
from biassurgery.errors import BadBatch, FileError, IncompatibleSites, NonFiniteActivation, SurgeryError, UnsupportedModel
from biassurgery.files import read_tensors, write_tensors
from biassurgery.measure import eval_mode
from biassurgery.ranks import gather

FORMAT = "biassurgery.key_values"
START = 0  # the code of the role `start` of text models


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Mean key and value of the start token. `a + b` merges two measurements of one model.

    Attributes:
        keys: (layers, key-value heads, channels of a key) float32; with rotary positions, after the rotation.
        values: (layers, key-value heads, channels of a value) float32.
        key_std, value_std: of the same shapes, standard deviation over sequences; 0 where the start token is a constant.
        count: sequences.
        architecture: of the model that they were measured on.
    """

    keys: Tensor
    values: Tensor
    key_std: Tensor
    value_std: Tensor
    count: int
    architecture: str

    @property
    def spread(self) -> float:
        """Largest standard deviation over the root mean square of its layer's keys or values: 0 means that a transplant is exact."""
        pairs = ((self.keys, self.key_std), (self.values, self.value_std))
        return max((std.amax((1, 2)) / mean.square().mean((1, 2)).sqrt().clamp(min=1e-12)).max().item() for mean, std in pairs)

    def __add__(self, other: KeyValues) -> KeyValues:
        if not isinstance(other, KeyValues):
            return NotImplemented
        for name, ours, theirs in (("architecture", self.architecture, other.architecture),
                                   ("keys", tuple(self.keys.shape), tuple(other.keys.shape)),
                                   ("values", tuple(self.values.shape), tuple(other.values.shape))):
            if ours != theirs:
                raise IncompatibleSites(f"key_values: {name} {ours} and {theirs} differ; add measurements of one model only.")
        count = self.count + other.count
        merged = [_merged(a, b, s, t, self.count, other.count) for a, b, s, t in
                  ((self.keys, other.keys, self.key_std, other.key_std), (self.values, other.values, self.value_std, other.value_std))]
        (keys, key_std), (values, value_std) = merged
        return KeyValues(keys, values, key_std, value_std, count, self.architecture)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. Raises FileError if that is not possible."""
        tensors = {name: getattr(self, name).contiguous() for name in ("keys", "values", "key_std", "value_std")}
        write_tensors(Path(path), tensors, {FORMAT: "1", "count": str(self.count), "architecture": self.architecture})

    @classmethod
    def load(cls, path: str | Path) -> KeyValues:
        """Read what `save` wrote. Raises FileError if the file does not hold it."""
        tensors, metadata = read_tensors(Path(path))
        try:
            if metadata[FORMAT] != "1":
                raise FileError(f"path: {path} has format {metadata[FORMAT]!r}, this version reads 1; update biassurgery.")
            return cls(tensors["keys"], tensors["values"], tensors["key_std"], tensors["value_std"], int(metadata["count"]),
                       metadata["architecture"])
        except (KeyError, ValueError) as error:
            raise FileError(f"path: {path} does not hold key values ({error!r}); pass a file written by KeyValues.save().") from error


def calibrate_key_values(model: nn.Module, batches: Batch | Iterable[Batch], *, progress: bool | None = None) -> KeyValues:
    """Mean key and value of the start token in every layer and head, for `patch_model(model, "transplant", key_values=...)`.

    Keys are what the softmax gets: after the rotation, which is the identity at position 0. Read in evaluation mode, without gradients,
    once; memory does not grow with the number of batches. Under `torch.distributed` all ranks get the sum.

    Args:
        model: a text model of a supported architecture.
        batches: as in `calibrate`; the first real token of each sequence counts, of each document in packed ones (`position_ids`).

    Raises:
        BadBatch, NonFiniteActivation, UnsupportedModel: see their messages; the model is as it was.
    """
    host = find_host(model)
    if host.adapter.modality != "text":
        raise UnsupportedModel(f"model: {type(host.model).__name__} reads images, which have no start token; key values are of text "
                               "models.")
    check_loaded(host)
    try:
        found: KeyValues | SurgeryError = _measure(host, batches, sys.stderr.isatty() if progress is None else progress)
    except SurgeryError as error:
        found = error
    return gather(found)


class _StartEdit(AttentionEdit):
    """Sums the keys and values at the start tokens of the batch at hand."""

    child = "start_of_sequence"

    def __init__(self, route: Any) -> None:
        super().__init__()
        self.route, self.starts = route, torch.empty(0, 2, dtype=torch.int64)
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, call: Call, columns: Any, out: Tensor, lse: Tensor) -> None:
        row, token = self.starts.to(call.k.device).unbind(1)
        for name, tensor in (("keys", call.k), ("values", call.v)):
            here = tensor[row, :, token].double().cpu()  # (N, Hkv, d)
            total, squares = self.sums.get(name, (torch.zeros((), dtype=torch.float64),) * 2)
            self.sums[name] = (total + here.sum(0), squares + here.square().sum(0))


def _measure(host: Host, batches: Batch | Iterable[Batch], progress: bool) -> KeyValues:
    from tqdm.auto import tqdm

    found = [host.adapter.attention(host.model, block) for block in host.blocks]
    for layer, each in enumerate(found):
        check_attention(each.module, layer)
    edits = [_StartEdit(each.route) for each in found]
    count = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), eval_mode(host.model):
        try:
            for each, edit in zip(found, edits):
                edit.attach(each.module)
            for batch in tqdm(as_batches(host, batches), desc="calibrating", unit="batch", disable=not progress):
                starts = _starts(host, batch)
                for edit in edits:
                    edit.starts = starts
                host.adapter.run(host.model, batch)
                count += len(starts)
        finally:
            for each, edit in zip(found, edits):
                edit.detach(each.module)
    if not count:
        raise BadBatch("batches: there is no real token in them; give sequences that are not all padding.")
    keys, key_std = _moments([edit.sums["keys"] for edit in edits], count)
    values, value_std = _moments([edit.sums["values"] for edit in edits], count)
    return KeyValues(keys, values, key_std, value_std, count, host.architecture)


def _starts(host: Host, batch: dict[str, Any]) -> Tensor:
    """(N, 2) the row and the position of every start token of a batch."""
    shape = batch.get("input_ids", batch.get("inputs_embeds")).shape  # type: ignore[union-attr]
    return (host.adapter.token_roles(host.model, batch, (shape[0], shape[1])) == START).nonzero()


def _moments(sums: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (layers, Hkv, d), float32."""
    if len({total.shape for total, _ in sums}) > 1:
        raise UnsupportedModel(f"model: its layers have heads of different shapes, {[tuple(t.shape) for t, _ in sums]}; key values of such "
                               "a model cannot be held in one table.")
    mean = torch.stack([total for total, _ in sums]) / count
    variance = torch.stack([squares for _, squares in sums]) / count - mean.square()
    if not mean.isfinite().all():
        raise NonFiniteActivation("batches: the keys or values of the start token hold NaN or infinity; run the model in bfloat16 or "
                                  "float32.")
    floor = 1e-14 * mean.square()  # what the subtraction leaves of a constant
    return mean.float(), torch.where(variance > floor, variance, 0).sqrt().float()


def _merged(a: Tensor, b: Tensor, s: Tensor, t: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of two sets of `m` and `n`."""
    a, b, s, t = (tensor.double() for tensor in (a, b, s, t))
    mean = (m * a + n * b) / (m + n)
    variance = (m * s.square() + n * t.square()) / (m + n) + (m * n) / (m + n) ** 2 * (a - b).square()
    return mean.float(), variance.sqrt().float()
