"""`start=`: one constant token in front of every sequence.

Where a tokenizer adds no BOS, whatever word comes first is the start token, and the massive
activation there varies with it. Behind a constant token it is a constant.

Source: Sun et al. 2024, section 4, for what the start token is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import READS
from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host, find_host
from biassurgery.adapters.text import START
from biassurgery.data.batches import IGNORED, Batch, as_inputs
from biassurgery.errors import BadBatch, BadOption, UnsupportedModel, warn

Start = int | str | None
_BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels")


def with_start(
    model: nn.Module, batch: Batch, start: int | str, *, tokenizer: Any = None
) -> dict[str, Any]:
    """A batch whose sequences begin with a constant token, directly in front of the first real one.

    For `model.generate(**with_start(model, batch, "<|im_start|>", tokenizer=tokenizer))`, where
    findings were measured with `start=`. Masks and position ids are made to fit; in labels the
    start token and the one behind it do not count, so that the same tokens count as without it.

    Args:
        model: a text model of a supported architecture.
        batch: `input_ids` (B, T) int64, or a dict of the model's arguments; rows may have padding
            on either side, told by `attention_mask` (B, T).
        start: a token of the tokenizer, such as `<|im_start|>`, or its id.
        tokenizer: the model's, where `start` is a token.

    Returns:
        A dict of the model's arguments on its device, one token longer: (B, T + 1).

    Raises:
        BadOption: `start` is no token of the model.
        BadBatch: embeddings, packed documents, or arguments of which it is not known what belongs
            to another token.
        UnsupportedModel: the model reads images.
    """
    host = find_host(model)
    token = start_id(host, start, tokenizer)
    (behind,) = behind_start(host, [as_inputs(host, batch, input_device(host.model))], token)
    return {host.adapter.ids if name == "input_ids" else name: x for name, x in behind.items()}


def start_id(host: Host, start: Start, tokenizer: Any = None) -> int | None:
    """The id of a start token that was asked for; None: none was.

    Raises:
        BadOption: it is no token of the model.
        UnsupportedModel: the model reads images.
    """
    if start is None:
        return None
    if host.adapter.modality != "text":
        raise UnsupportedModel(
            f"start: {start!r}, but {type(host.model).__name__} reads"
            f" {READS[host.adapter.modality]}, in front of which there is no token; leave start="
            " out."
        )
    token = _looked_up(start, tokenizer) if isinstance(start, str) else start
    size = host.adapter.vocabulary(host.model)
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise BadOption(
            f"start: {start!r}; give a token such as '<|im_start|>' with tokenizer=, or the id of"
            " one."
        )
    if size is not None and token >= size:
        raise BadOption(f"start: {start!r} is token {token}, and the model has {size}.")
    return token


def behind_start(
    host: Host, batches: Iterable[dict[str, Any]], start: int | None
) -> Iterator[dict[str, Any]]:
    """Checked batches with the token in front of every sequence; None: as they are.

    Raises:
        BadBatch: it cannot be put there.
    """
    told = False
    for batch in batches:
        if start is None:
            yield batch
            continue
        first = _first_tokens(host, batch)
        told = told or _warn_of_two(host, batch, first, start)
        yield _put_in_front(batch, first, start)


def chosen_start(start: int | None) -> dict[str, int]:
    """The option by which a checkpoint tells passes with a start token from others."""
    return {} if start is None else {"start": start}


def _looked_up(start: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise BadOption(
            f"start: {start!r} is a token, so tokenizer= is needed; pass the model's, or the"
            " token's id."
        )
    token = tokenizer.convert_tokens_to_ids(start)
    if token is None or (token == tokenizer.unk_token_id and start != tokenizer.unk_token):
        raise BadOption(
            f"start: {start!r} is no token of this tokenizer; give one of its special tokens,"
            f" {', '.join(tokenizer.all_special_tokens)}, or the id of any token."
        )
    return token


def _first_tokens(host: Host, batch: Mapping[str, Any]) -> Tensor:
    """(B,) where each row's first real token stands; T in a row of padding.

    Raises:
        BadBatch: there is no one place for the token, or no way to put it there.
    """
    if "input_ids" not in batch:
        raise BadBatch(
            "start: a batch holds inputs_embeds, in front of which no token can be put; put its"
            " embedding there, model.get_input_embeddings()(id), and leave start= out."
        )
    rows, tokens = batch["input_ids"].shape
    for name, value in batch.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        plain = value is None or isinstance(value, (bool, int, float, str))
        if not (plain or (name in _BY_TOKEN and shape in ((rows, tokens), (1, tokens)))):
            about = f"of shape {shape}" if shape else f"a {type(value).__name__}"
            raise BadBatch(
                f"start: a batch holds {name} {about} for ({rows}, {tokens}) tokens, and what of it"
                " would belong to one more is not known; put the token in front yourself, and leave"
                " start= out."
            )
    is_start = host.adapter.token_roles(host.model, batch, (rows, tokens)) == START
    if (is_start.sum(1) > 1).any():
        raise BadBatch(
            "start: a row holds several documents (position_ids start over); give one a row, or"
            " put the token in front of each yourself and leave start= out."
        )
    return torch.where(is_start.any(1), is_start.int().argmax(1), tokens)


def _put_in_front(batch: dict[str, Any], first: Tensor, start: int) -> dict[str, Any]:
    rows, tokens = batch["input_ids"].shape
    here = first[:, None]  # (B, 1)
    place = torch.arange(tokens + 1, device=first.device)[None]
    source = (place - (place > here).long()).clamp(max=tokens - 1)
    longer = dict(batch)
    for name in _BY_TOKEN:
        if isinstance(batch.get(name), Tensor):
            tensor = batch[name].expand(rows, tokens)
            longer[name] = tensor.gather(1, source.to(tensor.device))
    longer["input_ids"] = longer["input_ids"].masked_fill(place == here, start)
    if "attention_mask" in longer:
        # What stands behind a row of padding is padding.
        real = ((place == here) & (here < tokens)).to(longer["attention_mask"].dtype)
        longer["attention_mask"] = torch.where(place == here, real, longer["attention_mask"])
    if "position_ids" in longer:
        longer["position_ids"] = longer["position_ids"] + (place > here).long()
    if "labels" in longer:
        new = (place == here) | (place == here + 1)
        longer["labels"] = longer["labels"].masked_fill(new, IGNORED)
    return longer


def _warn_of_two(host: Host, batch: Mapping[str, Any], first: Tensor, start: int) -> bool:
    """Warn where all rows begin with that token, or with BOS, already; whether that is so."""
    ids = batch["input_ids"]
    there = ids.gather(1, first.clamp(max=ids.shape[1] - 1)[:, None])[first < ids.shape[1]]
    bos = getattr(getattr(host.root, "config", None), "bos_token_id", None)
    token = int(there[0]) if len(there) else -1
    if token not in (start, bos) or not (there == token).all():
        return False
    warn(
        f"start: the sequences begin with token {token} already, so two start tokens stand in front"
        f" of each, {start} and {token}; leave start= out, or the tokenizer's own"
        " (add_special_tokens=False)."
    )
    return True
