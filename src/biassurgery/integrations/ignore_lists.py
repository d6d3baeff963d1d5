"""An ignore list of `Diagnosis.ignore()` as llm-compressor and ONNX Runtime take it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any

from biassurgery.errors import BadOption, warn

_SCOPES = "pkg.torch.onnx.name_scopes"


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


def onnx_nodes(ignore: Iterable[str], nodes: Iterable[Any] | None = None) -> list[str]:
    """Names of nodes for `nodes_to_exclude=` of ONNX Runtime's `quantize_static`.

    torch.onnx's exporter (`dynamo=True`, the default since torch 2.9) numbers nodes and says in
    their metadata which modules they are of. Its older one and Optimum name those of
    `model.layers.11.mlp.down_proj` `/model/layers.11/mlp/down_proj/MatMul` (or `Gemm`): a module's
    path in slashes, with the index behind a list's name. ONNX Runtime passes over names that no
    node has without a word.

    Args:
        ignore: names of linear layers, from `Diagnosis.ignore()`.
        nodes: all nodes of the exported graph (`onnx.load(file).graph.node`), of which those of the
            layers are taken; or their names, where these are paths. None: `MatMul` of each is
            assumed, with a warning.

    Raises:
        BadOption: names that are none; or no node of the graph is of one of them.
    """
    names = _names(ignore)
    if nodes is None:
        warn(
            "nodes: None, so that nodes are assumed to be named by the path of their module, which"
            " torch.onnx.export(dynamo=True) does not do, and ONNX Runtime does not say so; pass"
            " onnx.load(file).graph.node."
        )
        return [f"/{_path(name)}/MatMul" for name in names]
    known = list(nodes)
    found = []
    for name in names:
        own = [getattr(node, "name", node) for node in known if _is_of(node, name)]
        if not own:
            raise BadOption(
                f"ignore: no node of the graph is of {name}, by its name or its metadata; pass"
                " onnx.load(file).graph.node of the graph as torch.onnx.export wrote it, before"
                " other tools renamed or joined its nodes."
            )
        found += own
    return found


def _is_of(node: Any, name: str) -> bool:
    """Whether a node, or the one of this name, computes a part of a module."""
    if f"/{_path(name)}/" in f"/{getattr(node, 'name', node)}/":
        return True
    scopes: list[str] = []
    for entry in getattr(node, "metadata_props", ()):
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)  # the modules around it, from the outermost on
    return any(f".{scope}".endswith(f".{name}") for scope in scopes)


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
