"""Ignore lists for llm-compressor (YAML) and ONNX Runtime."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from biassurgery.errors import BadOption
from biassurgery.integrations.ignore_lists import llm_compressor_recipe, onnx_nodes

NAMES = ["model.layers.11.mlp.down_proj", "model.layers.28.mlp.down_proj"]


def test_a_recipe():
    recipe = yaml.safe_load(llm_compressor_recipe(NAMES))
    (modifier,) = recipe["quant_stage"]["quant_modifiers"].values()
    assert modifier["ignore"] == ["lm_head", *NAMES]
    numbers = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    assert modifier["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel"},
        "input_activations": numbers | {"strategy": "tensor"},
    }


def test_a_recipe_with_smoothquant():
    modifiers = yaml.safe_load(llm_compressor_recipe([], smooth=0.5))["quant_stage"][
        "quant_modifiers"
    ]
    assert list(modifiers) == ["SmoothQuantModifier", "QuantizationModifier"]
    assert modifiers["SmoothQuantModifier"] == {"smoothing_strength": 0.5}
    for smooth in (0, 1, True):
        with pytest.raises(BadOption, match="smooth"):
            llm_compressor_recipe([], smooth=smooth)


def test_nodes_of_an_exported_graph():
    wanted = [f"/model/layers.{layer}/mlp/down_proj/MatMul" for layer in (11, 28)]
    with pytest.warns(UserWarning, match="dynamo"):
        assert onnx_nodes(NAMES) == wanted
    graph = [
        "/model/layers.1/mlp/down_proj/MatMul",
        *wanted,
        "/model/layers.11/mlp/down_proj/Add",
        "/model/layers.11/mlp/up_proj/MatMul",
        "/lm_head/MatMul",
    ]
    assert onnx_nodes(NAMES, graph) == [wanted[0], graph[3], wanted[1]]
    with pytest.raises(BadOption, match=r"model\.layers\.28\.mlp\.down_proj"):
        onnx_nodes(NAMES, graph[:2])


def test_nodes_that_are_numbered_and_say_where_they_are_from():
    """As torch.onnx.export(dynamo=True) writes them (torch 2.14): a wrapper `m`, MatMul and Add."""

    def node(name, *scopes):
        entry = SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=repr(["", *scopes]))
        other = SimpleNamespace(key="namespace", value="m.model.layers.11.mlp.down_proj")
        return SimpleNamespace(name=name, metadata_props=[other, entry])

    graph = [
        node("node_linear_6", "m", "m.model.layers.1", "m.model.layers.1.mlp.down_proj", "linear"),
        node("node_MatMul_9", "m", "m.model.layers.11.mlp.down_proj", "linear_13"),
        node("node_linear_13", "m", "m.model.layers.11.mlp.down_proj", "linear_13"),
        node("node_linear_14", "m", "m.lm_head", "linear_14"),
        SimpleNamespace(name="node_add", metadata_props=[]),
    ]
    assert onnx_nodes(NAMES[:1], graph) == ["node_MatMul_9", "node_linear_13"]
    with pytest.raises(BadOption, match=r"model\.layers\.28"):
        onnx_nodes(NAMES, graph)


@pytest.mark.parametrize("names", ["model", [1], [""]])
def test_names_that_are_none(names):
    with pytest.raises(BadOption, match="ignore"):
        onnx_nodes(names)
    with pytest.raises(BadOption, match="ignore"):
        llm_compressor_recipe(names)
