"""Short names for models, patches and batches, by which it is told whether they are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.meshes import reshard
from biassurgery.adapters.offloaded import sources_in
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption
from biassurgery.kinds import path_of
from biassurgery.surgery.edit import Edit, edits_in

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# of a config: where it came from, and what changes roundings only
_NOT_ARCHITECTURE = ("transformers_version", "dtype", "torch_dtype")


def facts_of(host: Host, argument: str) -> dict[str, Any]:
    """What the numbers of a pass depend on in the model, ready for JSON; the same on every device.

    Weights are told by the sums of the rows and of the columns of their bit patterns, which reads
    them once: an entry that changes, or two that change places, are seen. Those that accelerate
    has left on disk are told by their file: its size and the time when it was last written. Of
    weights that are split over ranks, each rank tells its own part.

    Args:
        host: the model.
        argument: what needs them, for messages.

    Raises:
        BadOption: there are weights that cannot be read, for they are on the meta device.
    """
    root = host.root
    reshard(root)  # else a rank's part is the whole of some, once a forward has gathered them
    config: Any = getattr(root, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    modules = [(name, *_description(module)) for name, module in root.named_modules()]
    tensors = (*root.named_parameters(), *root.named_buffers())
    elsewhere = sources_in(root)
    _check_readable(argument, [(name, t) for name, t in tensors if name not in elsewhere])
    return {
        "architecture": host.architecture,
        "tower": host.tower,
        "configuration": _short(json.dumps(_architecture(described), default=str), modules),
        "weights": _short(
            [(name, _weight(elsewhere.get(name, tensor))) for name, tensor in tensors]
        ),
        "patches": patches_in(root),
    }


def digest_of(thing: Any, before: bytes = b"") -> bytes:
    """The hash of the contents of a batch, and of what came before it.

    Raises:
        BadOption: it holds something whose contents are not known.
    """
    digest = hashlib.blake2b(before, digest_size=16)
    for piece in _contents(thing):
        digest.update(piece)
    return digest.digest()


def _contents(thing: Any) -> Iterator[Any]:
    if isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(thing, Mapping):
        yield f"mapping{len(thing)}".encode()
        for name in sorted(thing, key=str):
            yield from _contents(str(name))
            yield from _contents(thing[name])
    elif isinstance(thing, (tuple, list)):
        yield f"sequence{len(thing)}".encode()
        for item in thing:
            yield from _contents(item)
    elif thing is None or isinstance(thing, (str, bool, int, float)):
        yield f"{type(thing).__name__}{len(repr(thing))}{thing!r}".encode()
    else:
        raise BadOption(
            f"batches: a batch holds a {path_of(type(thing))}, whose contents cannot be compared"
            " with those of another pass, or of another rank; give tensors, numbers and texts, or"
            " leave checkpoint= and resume= out, or pass group=False."
        )


def _check_readable(argument: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if tensor.is_meta:
            raise BadOption(
                f"{argument}: {name} is on the meta device, as accelerate leaves what it has"
                " offloaded, so that these weights cannot be told from others; leave"
                f" {argument}= out, or load the model without offloading."
            )


def _short(*things: Any) -> str:
    return digest_of(things).hex()[:16]


def _architecture(config: Any) -> Any:
    """A config without what changes no number beyond rounding."""
    if not isinstance(config, Mapping):
        return config
    return {
        str(name): _architecture(value)
        for name, value in sorted(config.items(), key=str)
        if not str(name).startswith("_") and name not in _NOT_ARCHITECTURE
    }


def _description(module: nn.Module) -> tuple[str, ...]:
    """What a module is and, of a layer that PEFT adapts, which adapters run."""
    adapters = getattr(module, "active_adapters", ()) if hasattr(module, "merged_adapters") else ()
    disabled = getattr(module, "disable_adapters", False) if adapters else False
    return type(module).__qualname__, module.extra_repr(), f"{adapters} {disabled}"


def patches_in(root: nn.Module) -> list[str]:
    """The applied patches, in words; what their tensors are is among the model's."""
    return in_words(edit for _, edit in edits_in(root))


def in_words(edits: Iterable[Edit]) -> list[str]:
    """The patches that edits are of."""
    applied = {id(edit.patch): edit.patch for edit in edits if edit.patch is not None}
    return [
        f"{patch.mode.name} {_plain_options(patch.mode)} {patch.layers}"
        for patch in sorted(applied.values(), key=lambda patch: patch.order)
    ]


def _plain_options(mode: Any) -> dict[str, Any]:
    options = {field.name: getattr(mode, field.name) for field in fields(mode)}
    return {
        name: value
        for name, value in options.items()
        if isinstance(value, (int, float, str, tuple))
    }


def _weight(tensor: Any) -> Any:
    """What tells a weight; of one that accelerate has on disk, the file that it is in."""
    return _marginals(tensor) if isinstance(tensor, Tensor) else tensor


def _marginals(tensor: Tensor) -> list[Any]:
    """Sums of the bit patterns over rows and over columns, which are exact in any order."""
    described: list[Any] = [str(tensor.dtype), list(tensor.shape)]
    for bits in _bits(tensor):
        matrix = _matrix(bits)
        described += [matrix.sum(at, dtype=torch.int64) for at in (0, 1)]
    return described


def _matrix(bits: Tensor) -> Tensor:
    """The same bits as (rows, words), in words of eight bytes where they fit: read faster."""
    flat = bits.reshape(-1)
    row = bits.shape[-1] * bits.element_size() if bits.dim() else bits.element_size()
    if row and row % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        return flat.view(torch.int64).view(-1, row // 8)
    return flat[None] if not row or not bits.dim() else flat.view(-1, bits.shape[-1])


def _bits(tensor: Tensor) -> Iterator[Tensor]:
    """The bit patterns of a tensor as integers.

    Of a tensor that is made of others (quantised), of each; of one that is split over ranks, of
    this rank's part.
    """
    if hasattr(tensor, "to_local"):  # a DTensor
        tensor = tensor.to_local()  # type: ignore[operator]
    if hasattr(tensor, "__tensor_flatten__"):
        names: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):
                yield from _bits(part)
        return
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    yield plain.contiguous().view(_INTEGERS[plain.element_size()])
