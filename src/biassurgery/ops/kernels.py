"""torch's fused attention kernels that give the log-sum-exp, in one form, without dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from biassurgery.ops.masks import additive

aten = torch.ops.aten


class Inputs(NamedTuple):
    """What a kernel reads, with one entry a query head in k and v unless it is `grouped`."""

    q: Tensor
    """(B, H, T, d)."""
    k: Tensor
    """(B, H or Hkv, S, d)."""
    v: Tensor
    """(B, H or Hkv, S, dv)."""
    mask: Tensor | None
    """From `kernel_mask`, as is `causal`."""
    causal: bool
    scale: float


Saved = tuple[Tensor, ...]  # what a backward needs besides


class Kernel(NamedTuple):
    """A pair of calls."""

    forward: Callable[[Inputs], tuple[Tensor, Tensor, Saved]]
    """inputs -> out (B, H, T, dv), lse (B, H, T), saved."""
    backward: Callable[[Tensor, Inputs, Tensor, Tensor, Saved], tuple[Tensor, Tensor, Tensor]]
    """(grad_out, inputs, out, lse, saved) -> gradients of q, k, v."""
    grouped: bool


# torch registers these operators for its own `scaled_dot_product_attention`; they return what that
# one throws away. 0.0 is the dropout throughout.


def _cpu_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Saved]:
    q, k, v, mask, causal, scale = inputs
    # The same operator by torch's own name for it, which starts sooner than by `torch.ops`.
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(  # pyright: ignore[reportPrivateImportUsage]
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse, ()


def _cpu_backward(
    grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask, causal, scale = inputs
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _flash_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Saved]:
    q, k, v, _, causal, scale = inputs
    # Between lse and the random state (which backward wants even without dropout) it returns the
    # cumulative and largest lengths of packed sequences, at the end a debug mask: none is needed.
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return out, lse, (seed, offset)


def _flash_backward(
    grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, causal, scale = inputs
    lengths = (None, None, q.shape[2], k.shape[2])  # no cumulative ones, those of packed sequences
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, *saved, scale=scale
    )


def _efficient_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Saved]:
    q, k, v, mask, causal, scale = inputs
    # True: compute the log-sum-exp. It comes padded to whole blocks of 32 queries.
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]], (seed, offset)


def _efficient_backward(
    grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask, causal, scale = inputs
    # The kernel reads blocks of 32 queries; beyond the last one exp(logit - inf) is 0.
    lse = functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, mask, out, lse, *saved, 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


# Before torch 2.9 the CPU's kernel reads beyond the end of fewer key-value heads.
_CPU_GROUPED = torch.__version__ >= "2.9"
KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward, grouped=_CPU_GROUPED),
    "flash": Kernel(_flash_forward, _flash_backward, grouped=False),
    "efficient": Kernel(_efficient_forward, _efficient_backward, grouped=False),
}


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Name of the kernel for these tensors; None: there is none."""
    if q.shape[3] != v.shape[3] or not (q.dtype == k.dtype == v.dtype):
        return None
    if not (q.numel() and k.numel()):
        return None
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or torch.version.hip or q.shape[3] % 8 or q.dtype == torch.float64:
        return None
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    if q.dtype == torch.bfloat16 and not ampere:
        return None
    # More queries than keys: causality leaves the first ones nothing to see, which flash does not
    # report.
    blind = causal and q.shape[2] > k.shape[2]
    if mask is None and not blind and ampere and q.dtype != torch.float32 and q.shape[3] <= 256:
        return "flash"
    return "efficient"


def kernel_mask(
    name: str, mask: Tensor | None, causal: bool, q: Tensor, k: Tensor
) -> tuple[Tensor | None, bool]:
    """Mask and causality as the kernel takes them.

    Its own causal mask is aligned with the first key, flash's with the last.
    """
    if mask is None and (name == "flash" or not causal or q.shape[2] == k.shape[2]):
        return None, causal
    if name == "cpu":
        mask = additive(mask, causal, q, k, torch.promote_types(q.dtype, torch.float32))
        if mask is not None and mask.shape[-1] != 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
        return mask, False
    mask = additive(mask, causal, q, k, q.dtype)
    if mask is None:
        return None, False
    # Rows of the mask must begin at multiples of 16 bytes.
    mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    mask = functional.pad(mask, (0, -k.shape[2] % 16))[..., : k.shape[2]]
    return mask.expand(*q.shape[:3], k.shape[2]), False
