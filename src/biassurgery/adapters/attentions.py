"""The attention modules of a model, checked."""

from __future__ import annotations

from collections.abc import Iterable

from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, check_attention


def attentions(host: Host, layers: Iterable[int] | None = None) -> dict[int, Attention]:
    """The attention of each layer; without `layers`, of all that attend.

    In a hybrid model some layers keep a recurrent state instead.

    Args:
        host: the model.
        layers: 0-based indices; None: all layers that have an attention.

    Raises:
        UnsupportedModel: a layer has none that can be led to the core, or shares it with another.
    """
    if layers is None:
        attending = [
            layer
            for layer, block in enumerate(host.blocks)
            if host.adapter.attends(host.model, block)
        ]
        # Where none attends, the adapter says why.
        layers = attending or range(len(host.blocks))
    by_layer: dict[int, Attention] = {}
    for layer in layers:
        attention = host.adapter.attention(host.model, host.blocks[layer])
        check_attention(attention.module, layer)
        attention.route.check_host(attention.module)
        for other, earlier in by_layer.items():
            if earlier.module is attention.module:
                raise UnsupportedModel(
                    f"model: blocks {other} and {layer} of {type(host.model).__name__} share one"
                    " attention, which cannot be changed or watched for one; untie them"
                    " (copy.deepcopy) first."
                )
        by_layer[layer] = attention
    return by_layer
