"""`biassurgery generate`: text before and after a patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from torch import Tensor

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.output import about, header, show
from biassurgery.errors import BadOption

_MODES = ("set_zero", "set_mean")

Prompt = Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="How long a text.")]


@o.with_request
def generate(
    request: o.Request,
    given: o.Given,
    prompt: Prompt = "Once upon a time",
    mode: o.Modes = None,
    layers: o.LayersOption = "first",
    patch: o.PatchFolder = None,
    max_new_tokens: Tokens = 40,
    json: o.Json = False,
) -> None:
    """Show the text that a model writes, greedily, before and after a patch.

    Findings that no file has are measured, on --text if it is given.
    """
    from biassurgery.cli.findings import Findings
    from biassurgery.cli.modes import parse_layers, parse_mode
    from biassurgery.cli.prompts import prompt_ids

    asked = [parse_mode(spec) for spec in mode or (() if patch else _MODES)]
    where = parse_layers(layers)
    findings = Findings(given)
    inputs = prepare(request)
    ids = prompt_ids(inputs, prompt)
    model = inputs.host.root
    _check_writes(model, inputs)
    rows: list[dict[str, Any]] = []
    for label, patched in _variants(inputs, asked, findings, where, patch, bool(request.text)):
        with patched:
            tokens = _written(model, ids, max_new_tokens)
        text = inputs.tokenizer.decode(tokens)
        same = _shared(rows[0]["tokens"], tokens) if rows else len(tokens)
        rows.append({"mode": label, "text": text, "tokens": tokens, "same": same})
    document = header(inputs) | {"prompt": prompt, "results": rows}
    show(json, document, about(inputs), *map(_line, rows))


def _variants(
    inputs: Inputs, asked: list[Any], findings: Any, layers: Any, folder: Any, on_data: bool
) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    """The model as it is, under each mode, and under a saved patch: labels and how to get there."""
    from biassurgery.cli.patches import with_patch
    from biassurgery.evaluate.interventions import ORIGINAL
    from biassurgery.evaluate.labels import label_of
    from biassurgery.patching import patched

    model = inputs.host.root
    modes = [findings.mode(one, inputs, on_data) for one in asked]
    needed = any(one.needs_sites for one in modes)
    sites = findings.get("sites", inputs, on_data) if needed else None
    yield ORIGINAL, nullcontext()
    for one in modes:
        used = sites if one.needs_sites else None
        yield label_of(one), patched(model, one, sites=used, layers=layers)
    if folder is not None:
        yield str(folder), with_patch(model, folder)


def _written(model: Any, ids: Tensor, count: int) -> list[int]:
    """The tokens that greedy decoding adds to a prompt (1, T), which a transplant has without its
    start token.
    """
    import torch

    from biassurgery.cli.measures import has_no_start, without_start

    given = (without_start(ids) if has_no_start(model) else ids).to(model.device)
    if not given.shape[1]:
        raise BadOption("prompt: nothing is left of it without the start token; give a text.")
    with torch.no_grad():
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
    return output[0, given.shape[1] :].tolist()


def _check_writes(model: Any, inputs: Inputs) -> None:
    if not callable(getattr(model, "generate", None)):
        raise BadOption(
            f"model: {inputs.model['name']} ({type(model).__name__}) does not write text; give a"
            " causal language model."
        )


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two texts have in common before they part."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), len(second))


def _line(row: dict[str, Any]) -> str:
    parts = row["same"] < len(row["tokens"])
    where = f" (parts after {row['same']} tokens)" if parts else ""
    return f"{row['mode']}{where}: {row['text']!r}"
