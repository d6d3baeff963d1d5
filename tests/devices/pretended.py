"""A GPU made of a CPU: tensors with numbers that say they are on CUDA, and that do not mix with
those of another device.

What the library does with devices can so be run where there is no GPU: operators compute on the
CPU, and one that is given tensors of two
devices raises as on a GPU. Nothing is said about speed, streams, or the numbers of CUDA's own
kernels, and there is no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
SECOND = torch.device("cuda", 1)
aten = torch.ops.aten
# These take tensors of the CPU beside those of a GPU: copies, and places to read from or write to.
_MIXED = (
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


class Pretended(Tensor):
    """A tensor of the CPU that says it is somewhere else."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {self.device}"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes what is made on `cuda` without other tensors pretended, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def gpus() -> Iterator[None]:
    """Within it, `cuda` is pretended."""
    lift = torch._C._only_lift_cpu_tensors()
    convert = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            torch.no_grad(),
            _Factories(),
            patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(convert)


def replaced(model: nn.Module, other: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """The model with `other(path of the module, tensor)` in the place of each parameter and buffer;
    shared ones stay shared.
    """
    done: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in done:
                    done[id(tensor)] = other(path, tensor)
                if tensor is not None:
                    tensors[name] = done[id(tensor)]  # type: ignore[assignment]
    return model


def sent(model: nn.Module, place: Callable[[str], torch.device] = lambda _: GPU) -> nn.Module:
    """The model with the parameters and buffers of each module where `place` says, by its name."""

    def there(path: str, tensor: Tensor) -> Tensor:
        moved = Pretended(tensor.detach().clone(), place(path))
        return nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved

    return replaced(model, there)


def first(output: Any) -> Tensor:
    """The tensor that a model returned, or the first of them."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def back(tensor: Tensor) -> Tensor:
    """Its numbers, on the CPU."""
    return tensor.inner if isinstance(tensor, Pretended) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # attention of hosts in plain operators
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    target = pretended[0].device if asked is None and pretended else torch.device(asked or "cpu")
    _check(func, args, tensors, pretended)
    result = _KERNELS.get(func, func)(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if func._schema.is_mutable and args and isinstance(args[0], Tensor):
        return args[0]  # changed in place
    if target.type != "cuda":
        return result
    return tree_map(
        lambda each: (
            Pretended(each, target if target.index is not None else GPU)
            if isinstance(each, Tensor)
            else each
        ),
        result,
    )


def _check(func: Any, args: Any, tensors: list[Tensor], pretended: list[Pretended]) -> None:
    """Raise as CUDA does where devices mix; numbers alone (no axis) may come from the CPU."""
    if func in _MIXED:
        if func is aten.index.Tensor and pretended and not isinstance(args[0], Pretended):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        return
    devices = {
        tensor.device
        for tensor in tensors
        if pretended and (tensor.dim() or isinstance(tensor, Pretended))
    }
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got"
            f" {sorted(map(str, devices))}"
        )


def _bare(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    return back(leaf) if isinstance(leaf, Tensor) else leaf


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *_: Any,
    scale: float | None = None,
) -> Any:
    """CUDA's kernel, causal from the last key on, by that of the CPU, which is from the first."""
    mask = None
    if causal and q.shape[2] != k.shape[2]:
        late = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(
            1 + k.shape[2] - q.shape[2]
        )
        mask = torch.zeros(
            late.shape, dtype=torch.promote_types(q.dtype, torch.float32)
        ).masked_fill(late, -torch.inf)
        causal = False
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, causal, attn_mask=mask, scale=scale
    )
    none = torch.zeros((), dtype=torch.int64)
    return out, lse, none, none, q.shape[2], k.shape[2], none, none, none


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    wide = None if mask is None else mask.to(torch.promote_types(q.dtype, torch.float32))
    out, found = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, causal, attn_mask=wide, scale=scale
    )
    none = torch.zeros((), dtype=torch.int64)
    return out, found, none, none


_KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten.histc.default: (
        lambda tensor, *args: torch.histc(tensor.float(), *args).to(tensor.dtype)
    ),  # the CPU counts no integers
}
