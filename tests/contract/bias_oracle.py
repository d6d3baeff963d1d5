"""What an attention with explicit biases must return, by float64 arithmetic.

On the queries, keys and values of the unpatched model.

Nothing of the library takes part: the parameters are read off the patched model by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tests.contract.cases import Case
from tests.models import HEADS

Biases = list[dict[str, Tensor]]  # of every layer, by name


class Softmax(NamedTuple):
    """What an attention has computed when it comes to its softmax: all (B, H, ., .)."""

    q: Tensor
    k: Tensor
    v: Tensor
    added: Tensor  # to the logits
    scale: float


def biases_of(case: Case, model: nn.Module) -> Biases:
    """The parameters that a patch added to every attention."""
    return [
        {
            name.rpartition(".")[2]: parameter
            for name, parameter in attention.named_parameters()
            if name.startswith("attention_bias")
        }
        for attention, _ in case.attentions(model)
    ]


@contextmanager
def written_out(case: Case, model: nn.Module, biases: Biases) -> Iterator[None]:
    """Within it, the heads of an unpatched model return what the definition of the kind says."""
    seen: dict[str, Any] = {}

    def read(_: Any, args: Any, kwargs: Any) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    def mpt(_module: Any, _args: Any, mixed: Tensor) -> None:
        seen["softmax"] = _of_mpt(mixed)

    def hub(_module: Any, _args: Any, mixed: Tensor) -> None:
        seen["softmax"] = _of_thirds(mixed)

    def multihead(bias: dict[str, Tensor], module: Any, args: Any, output: Any) -> Any:
        softmax = _of_thirds(linear(args[0], module.in_proj_weight, module.in_proj_bias))
        heads = (
            _heads(case, softmax, bias, seen["input"])
            .transpose(1, 2)
            .flatten(2)
            .to(output[0].dtype)
        )
        return linear(heads, module.out_proj.weight, module.out_proj.bias), None

    def replace(bias: dict[str, Tensor], _: Any, args: Any) -> Any:
        return (
            _heads(case, seen["softmax"], bias, seen["input"])
            .transpose(1, 2)
            .flatten(2)
            .to(args[0].dtype),
        )

    with ExitStack() as undo:
        for (attention, projection), bias in zip(case.attentions(model), biases):
            undo.callback(attention.register_forward_pre_hook(read, with_kwargs=True).remove)
            undo.callback(projection.register_forward_pre_hook(partial(replace, bias)).remove)
            # MPT computes its softmax by itself, as does DINOv2 of torch.hub.
            if case.family == "mpt":
                undo.callback(attention.get_submodule("Wqkv").register_forward_hook(mpt).remove)
            if case.family == "hub_dinov2":
                undo.callback(attention.get_submodule("qkv").register_forward_hook(hub).remove)
            # nn.MultiheadAttention calls neither sdpa nor its projection where a hook could see it.
            if case.family == "open_clip_vision":
                undo.callback(attention.register_forward_hook(partial(multihead, bias)).remove)
        undo.enter_context(_Sdpa(seen))
        yield


class _Sdpa(TorchFunctionMode):
    """Keeps what the last call of sdpa was given."""

    def __init__(self, seen: dict[str, Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.seen["softmax"] = _of_sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Softmax:
    assert not dropout_p
    added = _causal(query.shape[2]) if is_causal else torch.zeros(1, dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = torch.zeros(1, dtype=torch.float64).masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        added = attn_mask
    return Softmax(query, key, value, added, query.shape[-1] ** -0.5 if scale is None else scale)


def _of_mpt(mixed: Tensor) -> Softmax:
    """ALiBi with slopes 2 ** (-8 h / H), h from 1, a token that a key is before the query.

    Source: Press et al. 2022.
    """
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
    places = torch.arange(q.shape[2])
    slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    return Softmax(
        q,
        k,
        v,
        slopes[:, None, None] * (places - places[:, None]) + _causal(q.shape[2]),
        q.shape[-1] ** -0.5,
    )


def _of_thirds(mixed: Tensor) -> Softmax:
    """Queries, keys and values one after the other, nothing masked."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
    return Softmax(q, k, v, torch.zeros(1, dtype=torch.float64), q.shape[-1] ** -0.5)


def _causal(length: int) -> Tensor:
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(
        ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
    )


def _heads(
    case: Case, softmax: Softmax, bias: dict[str, Tensor], attention_input: Tensor
) -> Tensor:
    """(B, H, T, dv) float64: Sun et al. 2024, equation 3, and its kin."""
    q, k, v = (_for_every_head(x.double(), 1) for x in softmax[:3])
    given = {name: _for_every_head(x.double(), 0) for name, x in bias.items()}
    logits = q @ k.mT * softmax.scale + softmax.added
    match case.variant.removeprefix("attention_bias "):
        case "kv" | "k":
            column = (q * given["k_bias"][:, None]).sum(-1, keepdim=True) * softmax.scale
        case "sink_logit":
            column = given["sink_logit"][:, None, None].expand(*q.shape[:3], 1)
        case "off_by_one":
            column = torch.zeros(*q.shape[:3], 1)
        case _:
            column = torch.full((*q.shape[:3], 1), -torch.inf)
    probs = torch.cat([logits, column], -1).softmax(-1)
    out = probs[..., :-1] @ v
    match case.variant.removeprefix("attention_bias "):
        case "kv":
            out = out + probs[..., -1:] * given["v_bias"][:, None]
        case "v":
            out = out + given["v_bias"][:, None]
        case "gate":
            opening = torch.einsum("btc,hc->bht", attention_input.double(), given["gate"])
            out = out * 2 / (1 + (-opening).exp())[..., None]
    return out


def _for_every_head(x: Tensor, axis: int) -> Tensor:
    """Keys, values and biases of a group of heads, repeated for each of them."""
    return x.repeat_interleave(HEADS // x.shape[axis], axis)
