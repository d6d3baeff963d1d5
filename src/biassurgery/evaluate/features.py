"""What a frozen model says of an image in one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.libraries import is_fsdp
from biassurgery.adapters.registry import Host
from biassurgery.adapters.sharing import without_ddp
from biassurgery.errors import BadBatch, BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.evaluate.labelled import LabelledBatch, image_host, labelled
from biassurgery.measure.observe import observed
from biassurgery.measure.ranks import Ranks
from biassurgery.measure.reading import reading, with_bar
from biassurgery.measure.together import in_step
from biassurgery.surgery.block import added_tokens

# called with the model, the images (B, C, H, W), and by name what else a batch holds; returns
# (B, D)
Features = Callable[..., Tensor]
_NORMS = ("norm", "layernorm")


def image_features(model: nn.Module, images: Tensor, **arguments: Any) -> Tensor:
    """The features (B, D), not normalised, that a model's own authors compare images by.

    These are the projected image embeddings of CLIP and SigLIP (open_clip, transformers), what the
    classifier of a timm model reads, and the [CLS] token after the final norm of DINOv2, DINOv3,
    MAE and ViT.

    Args:
        model: a model of a supported architecture.
        images: (B, C, H, W), normalised.
        **arguments: further arguments of the model.

    Raises:
        UnsupportedModel: it gives no such features.
    """
    host = image_host(model, "a feature")
    root: Any = host.root
    adapter: Any = host.adapter
    if hasattr(root, "get_image_features"):
        _check_gathers(root, "get_image_features")
        return pooled(root.get_image_features(pixel_values=images, **arguments))
    if hasattr(root, "encode_image"):
        _check_gathers(root, "encode_image")
        return root.encode_image(images)
    if hasattr(root, "forward_head"):
        _check_gathers(root, "forward_features", "forward_head")
        return root.forward_head(root.forward_features(images), pre_logits=True)
    if adapter.has_cls(host.model) and _final_norm(host) is not None:
        return cls_and_patches(host, {"pixel_values": images, **arguments}, 1)[0][0]
    return pooled(root(images, **arguments))


def class_and_patch_features(
    model: nn.Module, images: Tensor, *, layers: int = 1, **arguments: Any
) -> Tensor:
    """(B, (layers + 1) * D): [CLS] of the last blocks, in order, and the last one's mean patch.

    All are taken after the final norm. This is what the published linear heads of DINOv2 read
    (Oquab et al. 2023, section 7.1), with 1 or 4 layers.

    Args:
        model: a vision transformer with [CLS] in front.
        images: `pixel_values` (B, C, H, W).
        layers: how many of the last blocks give their [CLS].
        **arguments: further ones of the model's forward.

    Raises:
        BadOption: more layers than the model has.
        UnsupportedModel: it has no [CLS] token, or its final norm is not known.
    """
    tokens = cls_and_patches(
        image_host(model, "a feature"), {"pixel_values": images, **arguments}, layers
    )
    return torch.cat([*(cls for cls, _ in tokens), tokens[-1][1].mean(1)], 1)


def cls_and_patches(host: Host, inputs: dict[str, Any], layers: int) -> list[tuple[Tensor, Tensor]]:
    """[CLS] (B, D) and patches (B, N, D) at each of the last blocks, after the final norm."""
    norm = _final_norm(host)
    kind = type(host.root).__name__
    adapter: Any = host.adapter
    if norm is None or not adapter.has_cls(host.model):
        raise UnsupportedModel(
            f"model: {kind} has no [CLS] token with a final norm ({' or '.join(_NORMS)}) that it is"
            " read after; pass features=image_features, or a function of your own."
        )
    if layers > len(host.blocks):
        raise BadOption(
            f"layers: {layers}, but {kind} has {len(host.blocks)} blocks; is the head that of a"
            " larger model?"
        )
    seen: dict[int, Tensor] = {}

    def see(layer: int, hidden: Tensor) -> None:
        if layer >= len(host.blocks) - layers:
            seen[layer] = hidden

    with torch.compiler.set_stance("force_eager"), observed(host, see):
        adapter.run(host.model, inputs)
    normed = [norm(seen[layer]) for layer in sorted(seen)]
    first_patch = 1 + adapter.registers(host.model) + added_tokens(host.blocks[0])
    return [(tokens[:, 0], tokens[:, first_patch:]) for tokens in normed]


def pooled(output: Any) -> Tensor:
    """The one vector an image or text in what a model returned.

    transformers 4 gives the tensor itself, transformers 5 an output.
    """
    candidates = (output, *(getattr(output, n, None) for n in ("image_embeds", "pooler_output")))
    vectors = next((tensor for tensor in candidates if isinstance(tensor, Tensor)), None)
    if vectors is None:
        raise UnsupportedModel(
            f"model: it returns {type(output).__name__} without pooled features; pass features=, a"
            " function of model and images that returns (B, D)."
        )
    return vectors


def called(features: Features, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(B, D) float32: what a function says of a batch, checked."""
    pixels = inputs["pixel_values"]
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    vectors = features(without_ddp(model), pixels, **others)
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or len(vectors) != len(pixels):
        shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise UnsupportedModel(
            f"features: {shape} for {len(pixels)} images; one vector an image, (B, D), is needed."
        )
    return vectors.float()


def extract(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    features: Features,
    *,
    name: str,
    progress: bool | None,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) int64 of all images, on the model's device.

    All of `ranks` read the same ones.

    Raises:
        BadBatch: no batches, one that is no pair of images and labels, or a negative label.
        NonFiniteActivation: NaN or infinity in the features.
    """
    host = image_host(model, name)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    with reading(host.root, eager=False):
        same = ranks.alike(with_bar(batches, name, progress), "train")
        for inputs, target in in_step(labelled(host, same), host.root):
            row = called(features, model, inputs)
            rows.append(row)
            labels.append(target.to(row.device, torch.int64, non_blocking=row.is_cuda))
    if not rows:
        raise BadBatch("batches: there are none; give at least one pair of images and labels.")
    vectors = torch.cat(rows)
    classes = torch.cat(labels)
    if not vectors.isfinite().all():
        raise NonFiniteActivation(
            "batches: the features hold NaN or infinity; run the model in bfloat16 or float32, and"
            " look at its weights."
        )
    if int(classes.min()) < 0:
        raise BadBatch(f"batches: a label is {int(classes.min())}; give class indices from 0 on.")
    return vectors, classes


def _check_gathers(root: nn.Module, *methods: str) -> None:
    """Raise `UnsupportedModel` where FSDP2 would leave a method with parts of the weights."""
    if is_fsdp(root):
        missing = [name for name in methods if name not in vars(root)]  # torch wraps them there
        if missing:
            raise UnsupportedModel(
                f"model: FSDP2 gathers the weights of {type(root).__name__} in its forward alone,"
                f" and its features are those of {', '.join(missing)}; call torch.distributed.fsdp."
                f"register_fsdp_forward_method(model, {missing[0]!r}) first."
            )


def _final_norm(host: Host) -> nn.Module | None:
    """What is applied to the output of the last block before it is read."""
    # In transformers `base_model` is the model without its classifier.
    holders = (host.model, getattr(host.model, "base_model", host.model))
    norms = (getattr(holder, name, None) for holder in holders for name in _NORMS)
    return next((norm for norm in norms if isinstance(norm, nn.Module)), None)
