"""The attention modules of a model, checked."""

from __future__ import annotations

from collections.abc import Iterable

from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.parallel import check_stream, tensor_parallel_mesh
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, check_attention
from biassurgery.surgery.heads import HeadShare


def attentions(host: Host, layers: Iterable[int] | None = None) -> dict[int, Attention]:
    """The attention of each layer; without `layers`, of all that attend.

    In a hybrid model some layers keep a recurrent state instead.

    Args:
        host: the model.
        layers: 0-based indices; None: all layers that have an attention.

    Raises:
        UnsupportedModel: a layer has none that can be led to the core, or shares it with another.
    """
    check_stream(host)
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
    return _shared(host, by_layer)


def _shared(host: Host, by_layer: dict[int, Attention]) -> dict[int, Attention]:
    """The attentions with how their heads lie on tensor-parallel ranks.

    Raises:
        UnsupportedModel: it is not known, for the model is not one of transformers, whose configs
            say how many heads there are on all ranks.
    """
    mesh = tensor_parallel_mesh(host.root)
    if mesh is None:
        return by_layer
    if not is_transformers(host.model):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} is split over {mesh.size()} tensor-parallel ranks,"
            " which is served of models of transformers only where it comes to attention; load it"
            " on one rank, or leave out what changes or watches attention."
        )
    return {
        layer: attention._replace(
            share=HeadShare(mesh, attention.shape.heads, attention.shape.kv_heads)
        )
        for layer, attention in by_layer.items()
    }
