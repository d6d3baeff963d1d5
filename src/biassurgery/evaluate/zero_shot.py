"""Zero-shot classification: images against texts that name the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.wrappers import unwrap
from biassurgery.errors import BadOption, NonFiniteActivation, UnsupportedModel
from biassurgery.evaluate.counting import accuracy
from biassurgery.evaluate.features import called, image_features, pooled
from biassurgery.evaluate.labelled import LabelledBatch, image_host
from biassurgery.measure.ranks import Group, taking_part
from biassurgery.measure.reading import reading, with_bar

Template = str | Callable[[str], str]
TEMPLATES: tuple[Template, ...] = ("a photo of a {}.",)


def imagenet_prompts() -> tuple[list[str], list[Template]]:
    """open_clip's 1000 class names and 80 templates for ImageNet (Radford et al. 2021)."""
    from open_clip import zero_shot_metadata

    names = list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    return names, list(zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES)


def zero_shot_head(
    model: nn.Module,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[Template] = TEMPLATES,
    *,
    batch_size: int = 256,
    progress: bool | None = None,
) -> Tensor:
    """A classifier of texts: for each class the normalised mean of its prompts' unit embeddings.

    Source: Radford et al. 2021, section 3.1.4.

    Args:
        model: a model of images and texts of open_clip or transformers (CLIP, SigLIP and their
            kin).
        tokenizer: open_clip's, or that of transformers.
        class_names: by class index; a name may stand in several classes.
        templates: texts with `{}` in the place of the name, or functions from name to text, as
            open_clip has them.
        batch_size: prompts a forward.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.

    Returns:
        (D, C) float32 on the model's device.

    Raises:
        BadOption: no class names, or a template without `{}`.
        NonFiniteActivation: NaN in an embedding.
        UnsupportedModel: the model embeds no texts.
    """
    _check_names(class_names, templates)
    root: Any = unwrap(model)
    prompts = [
        t.format(name) if isinstance(t, str) else t(name) for name in class_names for t in templates
    ]
    starts = range(0, len(prompts), batch_size)
    with reading(root, eager=False):
        rows = [
            F.normalize(
                _text_features(root, tokenizer, prompts[at : at + batch_size]).float(), dim=1
            )
            for at in with_bar(starts, "zero-shot head", progress)
        ]
    # All prompts of a class stand together: rows of classes x templates.
    means = torch.cat(rows).unflatten(0, (len(class_names), -1)).mean(1)
    head = F.normalize(means, dim=1).T.contiguous()
    if not head.isfinite().all():
        raise NonFiniteActivation(
            "class_names: their embeddings hold NaN; run the model in bfloat16 or float32, and look"
            " at its weights."
        )
    return head


def _check_names(class_names: Sequence[str], templates: Sequence[Template]) -> None:
    if isinstance(class_names, str) or not len(class_names):
        raise BadOption(f"class_names: {class_names!r}; give a list with one name a class.")
    if isinstance(templates, str) or not len(templates):
        raise BadOption(f"templates: {templates!r}; give a list, for example {list(TEMPLATES)}.")
    wrong = [
        template for template in templates if isinstance(template, str) and "{}" not in template
    ]
    if wrong:
        raise BadOption(
            f"templates: {wrong[0]!r} has no {{}} where the name of a class would go; add it."
        )


def zero_shot_accuracy(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    head: Tensor,
    *,
    progress: bool | None = None,
    resume: str | Path | None = None,
    checkpoint: str | Path | None = None,
    group: Group = None,
) -> float:
    """Share, 0 to 1, of images whose embedding is most similar (cosine) to that of their class.

    As in Sun et al. 2024, table 4.

    Args:
        model: the model that made the head, patched or not.
        batches: pairs of normalised images (B, C, H, W) and labels (B,) int64, or dicts of the
            model's arguments with `labels`.
        head: (D, C), what `zero_shot_head` returned.
        progress: show a progress bar; None: on a terminal, and elsewhere a line every ten seconds.
        resume: a JSON file to keep the counts of several evaluations in, so that an interrupted
            one goes on where it was, and one of another model, head or first batch begins anew;
            None: nothing is kept.
        checkpoint: a file to keep the count of this evaluation in, so that it goes on where it was;
            one of another model, head or other batches is refused. See docs/evaluation.md.
        group: whose data are added up under `torch.distributed`, see `calibrate`.

    Raises:
        BadBatch: no batches, one that is not such a pair, or labels that the head does not have.
        BadOption: a head of another model, or `resume` or `checkpoint` with a loader that
            shuffles.
        FileError: `resume` or `checkpoint` cannot be used.
        NonFiniteActivation: NaN in the embeddings.
        UnsupportedModel: the model embeds no images.
        RankFailed: another rank has failed, or does not answer.
    """
    with taking_part("zero_shot_accuracy", model, group) as ranks:
        host = image_host(model, "zero-shot accuracy")
        texts = head.to(input_device(host.root), torch.float32)

        def similarities(inputs: dict[str, Any]) -> Tensor:
            embeddings = F.normalize(called(image_features, model, inputs), dim=1)
            if embeddings.shape[1] != len(texts):
                raise BadOption(
                    f"head: (D, C) is {tuple(head.shape)}, but the images' embeddings have"
                    f" {embeddings.shape[1]} numbers; give what zero_shot_head(model, ...) returned"
                    " for this model."
                )
            return embeddings @ texts.to(embeddings.device)

        return accuracy(
            ranks,
            host,
            batches,
            similarities,
            name="zero-shot",
            progress=progress,
            resume=resume,
            checkpoint=checkpoint,
            head=(head,),
            whose="the head",
        )


def _text_features(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """(B, D): the embeddings of texts, padded as the model was trained to read them."""
    device = input_device(model)
    if hasattr(model, "encode_text"):
        return model.encode_text(tokenizer(texts).to(device))
    if not hasattr(model, "get_text_features"):
        raise UnsupportedModel(
            f"model: {type(model).__name__} has neither encode_text nor get_text_features, so it"
            " embeds no texts; use a model of images and texts such as CLIP."
        )
    # SigLIP was trained on texts of one length, and to read the padding like any token.
    padded = model.config.model_type.startswith("siglip")
    inputs = tokenizer(
        texts,
        padding="max_length" if padded else True,
        truncation=True,
        return_tensors="pt",
        max_length=model.config.text_config.max_position_embeddings,
    )
    names = ("input_ids",) if padded else ("input_ids", "attention_mask")
    return pooled(model.get_text_features(**{name: inputs[name].to(device) for name in names}))
