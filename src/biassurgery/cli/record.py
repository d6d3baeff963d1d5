"""`biassurgery record`: what a model computes inside, as a file."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.output import about, header, show

What = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        help=(
            "A quantity; may be repeated: block_input, block_output, norm_output, q, k, v, logits, "
            "probs, attention_output, sink_mass, bias_mass, lse, value_updates."
        ),
    ),
]
Layers = Annotated[str, typer.Option(help="all, or indices such as 2,5.")]
Output = Annotated[
    Path, typer.Option("--output", metavar="FILE", help="Where to (safetensors), as name.layer.")
]


@o.with_request
def record(
    request: o.Request,
    what: What,
    output: Output,
    layers: Layers = "all",
    prompt: o.Prompt = None,
    patch: o.PatchFolder = None,
    json: o.Json = False,
) -> None:
    """Write what a model computes in one forward: hidden states, attention, sinks.

    Of a prompt, or of the first window or image (--max-windows, --max-images: of more).
    """
    from biassurgery.cli.modes import parse_indices
    from biassurgery.cli.patches import with_patch
    from biassurgery.measure.record import record

    where = None if layers == "all" else parse_indices(layers, "all, or")
    inputs = prepare(replace(request, limit=request.limit or 1))
    batch = _batch(inputs, prompt)
    model = inputs.host.root
    with with_patch(model, patch), record(model, what, where, device="cpu") as recorded:
        _run(inputs, batch)
    tensors = {
        f"{name}.{layer}": tensor.contiguous()
        for name in what
        for layer, tensor in recorded[name].items()
    }
    _save(output, tensors, batch, inputs)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    document = header(inputs) | {"saved": str(output), "tensors": shapes}
    lines = [f"{name}: {tuple(shape)}" for name, shape in shapes.items()]
    show(json, document, about(inputs), *lines, f"saved to {output}")


def _batch(inputs: Inputs, prompt: str | None) -> Tensor:
    """Token ids (1, T), or the first windows or images."""
    from biassurgery.cli.prompts import prompt_ids

    if prompt is not None:
        return prompt_ids(inputs, prompt)
    batches = list(inputs.batches)
    first = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    import torch

    rows = torch.cat(first)
    if inputs.start is None:
        return rows
    return torch.nn.functional.pad(rows, (1, 0), value=inputs.start)


def _run(inputs: Inputs, batch: Tensor) -> None:
    import torch

    from biassurgery.data.batches import as_batches

    (checked,) = as_batches(inputs.host, batch)
    with torch.no_grad():
        inputs.host.adapter.run(inputs.host.model, checked)


def _save(output: Path, tensors: dict[str, Tensor], batch: Tensor, inputs: Inputs) -> None:
    from biassurgery.findings.files import write_tensors

    read = {"input_ids": batch} if inputs.reads_text else {}
    facts = {"biassurgery.record": json_format.dumps(header(inputs))}
    write_tensors(output, tensors | read, facts)
