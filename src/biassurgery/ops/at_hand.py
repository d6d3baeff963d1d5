"""Numbers that Python can look at for next to nothing, so that an operator more is not worth it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

_FEW = 64


def at_hand(x: Tensor) -> bool:
    """Whether `x.tolist()` is a matter of a microsecond: a few numbers on the CPU, known by now.

    They are not where a forward is compiled, traced, exported or mapped (`torch.func`), or where it
    runs on stand-ins; on a GPU one would wait for them.
    """
    return (
        type(x) is Tensor  # a stand-in, or one rank's part, is of a class of its own
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and x.numel() <= _FEW
        # Modes of dispatch see every operator: stand-ins, torch.fx and torch.export are made so.
        and not torch._C._len_torch_dispatch_stack()
        and not is_functorch_wrapped_tensor(x)
    )
