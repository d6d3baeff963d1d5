"""An ignore list of `Diagnosis.ignore()` as llm-compressor and ONNX Runtime take it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from biassurgery.errors import BadOption


def llm_compressor_recipe(
    ignore: Iterable[str], *, smooth: float | None = None, head: str = "lm_head"
) -> str:
    """A recipe of llm-compressor for static int8: YAML, for `oneshot(recipe=...)`.

    Weights have one scale an output channel and activations one a tensor, set on its calibration
    data.

    Args:
        ignore: names of linear layers that stay in floating point, from `Diagnosis.ignore()`.
        smooth: strength of SmoothQuant, from 0 to 1; None: without.
        head: the output layer, which stays in floating point, too.

    Raises:
        BadOption: names that are none, or a strength that is none.
    """
    names = [head, *_names(ignore)]
    lines = ["quant_stage:", "  quant_modifiers:"]
    if smooth is not None:
        if isinstance(smooth, bool) or not 0 < smooth < 1:
            raise BadOption(f"smooth: {smooth!r}; give a number between 0 and 1, such as 0.5.")
        lines += ["    SmoothQuantModifier:", f"      smoothing_strength: {smooth}"]
    lines += [
        "    QuantizationModifier:",
        f"      ignore: {json.dumps(names)}",
        "      config_groups:",
        "        group_0:",
        "          targets: [Linear]",
        "          weights:",
        *_numbers("channel"),
        "          input_activations:",
        *_numbers("tensor"),
    ]
    return "\n".join(lines) + "\n"


def onnx_nodes(ignore: Iterable[str], nodes: Iterable[str] | None = None) -> list[str]:
    """Names of nodes for `nodes_to_exclude=` of ONNX Runtime's `quantize_static`.

    torch.onnx and Optimum name the nodes of `model.layers.11.mlp.down_proj`
    `/model/layers.11/mlp/down_proj/MatMul` (or `Gemm`): a module's path in slashes, with the index
    behind a list's name.

    Args:
        ignore: names of linear layers, from `Diagnosis.ignore()`.
        nodes: the names of all nodes of the exported graph (`[n.name for n in model.graph.node]`),
            of which those of the layers are taken; None: `MatMul` of each is assumed.

    Raises:
        BadOption: names that are none; or no node of the graph is of one of them.
    """
    paths = {name: "/" + _path(name) + "/" for name in _names(ignore)}
    if nodes is None:
        return [f"{path}MatMul" for path in paths.values()]
    known = list(nodes)
    found = []
    for name, path in paths.items():
        own = [node for node in known if path in node + "/"]
        if not own:
            raise BadOption(
                f"ignore: no node of the graph is called {path}...; was the graph exported without"
                f" the names of modules? {name} cannot be left out by its name then."
            )
        found += own
    return found


def _path(name: str) -> str:
    """`a.layers.3.b` -> `a/layers.3/b`."""
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/".join(parts)


def _names(ignore: Iterable[str]) -> list[str]:
    names = [] if isinstance(ignore, str) else list(ignore)
    if isinstance(ignore, str) or not all(isinstance(name, str) and name for name in names):
        raise BadOption(f"ignore: {ignore!r}; give a list of names, such as diagnosis.ignore().")
    return names


def _numbers(strategy: str) -> list[str]:
    told = (
        "num_bits: 8",
        "type: int",
        "symmetric: true",
        "dynamic: false",
        f"strategy: {strategy}",
    )
    return [f"            {line}" for line in told]
