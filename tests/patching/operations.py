"""What random operations consist of, and everything that they must leave as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import biassurgery as bs
from tests.patching.subjects import IDS, Subject, subject
from tests.state import fingerprint

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}
MEASURES: dict[str, Callable[[nn.Module, Subject, Any], Any]] = {
    "calibrate": lambda model, kind, tower: bs.calibrate(
        model, kind.read(model, tower), tower=tower, **kind.thresholds
    ),
    "detect": lambda model, kind, tower: bs.detect(model, kind.read(model, tower), tower=tower),
    "calibrate_key_values": lambda model, kind, tower: bs.calibrate_key_values(
        model, kind.read(model, tower)
    ),
    "calibrate_registers": lambda model, kind, tower: bs.calibrate_registers(
        model, kind.read(model, tower)
    ),
    "find_register_neurons": lambda model, kind, tower: bs.find_register_neurons(
        model, kind.read(model, tower), count=2
    ),
    "record": lambda model, kind, tower: recorded(model, kind, what=QUANTITIES, tower=tower),
}
QUANTITIES = (
    "block_input",
    "block_output",
    "norm_output",
    "attention_output",
    "q",
    "k",
    "v",
    "logits",
    "probs",
    "sink_mass",
    "bias_mass",
    "value_updates",
)


def recorded(model: nn.Module, kind: Subject, **arguments: Any) -> Any:
    """The record of one forward."""
    with bs.record(model, **arguments) as record:
        kind.output(model)
    return record


def _saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def wrong(mode: Any, **arguments: Any) -> Callable[[nn.Module, Any], Any]:
    return lambda model, tower: bs.patch_model(model, mode, **{"tower": tower} | arguments)


def _sites_of_another(model: nn.Module) -> bs.Sites:
    """Of a model of another size."""
    width = min(parameter.shape[0] for parameter in model.parameters() if parameter.dim() == 1)
    other = subject("llama" if width == 32 else "clip")
    return next(p.options["sites"] for p in other.patchings if "sites" in p.options)


# Each must be refused, whatever the model.
WRONG: tuple[Callable[[nn.Module, Any], Any], ...] = (
    wrong("no_such_mode"),
    wrong(3),
    wrong("set_mean", value=3.0),
    wrong("instrument", layers=[0, 99]),
    wrong("instrument", layers="some"),
    wrong("instrument", tower="nowhere"),
    wrong("set_zero", sites=bs.Sites()),
    wrong("set_value", value=float("nan")),
    wrong("set_value", value=1.0, channels=(10_000,), positions=(0,)),
    wrong("set_value", value=1.0, channels=(1,), positions=(-1,)),
    wrong("attention_bias", kind="no_such_kind"),
    wrong("attention_bias", init=3),
    wrong("attention_bias", std=-1.0),
    wrong("attention_bias", trainable="some"),
    wrong("transplant", key_values=None),
    wrong("fix_registers", fill="some"),
    wrong("test_time_registers", neurons=None),
    lambda model, tower: wrong("set_mean", sites=_sites_of_another(model))(model, tower),
    lambda model, _: bs.unpatch_model(model, "no_such_mode"),
    lambda model, _: bs.load_patch(model, "/no/such/folder"),
    lambda model, tower: bs.calibrate(model, [], tower=tower),
    lambda model, tower: bs.detect(model, torch.zeros(0), tower=tower),
    lambda model, tower: recorded(model, None, what="nothing", tower=tower),  # type: ignore
    lambda model, tower: recorded(model, None, what="q", layers=[99], tower=tower),  # type: ignore
)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model is, but for how often its tensors were written and which objects they are:
    casting makes new buffers.
    """
    seen = {
        name: (value[1], value[3]) if isinstance(value, tuple) else value
        for name, value in fingerprint(model).items()
    }
    configs = {id(config): config for config in map(config_of, model.modules()) if config}
    for number, config in enumerate(configs.values()):
        seen[f"config {number}"] = config.to_dict()
    return seen


def config_of(module: nn.Module) -> Any:
    """The module's own config of transformers, whatever the class shows in its place."""
    config = vars(module).get("config")
    return config if hasattr(config, "to_dict") else None


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(after) == list(before), sorted(set(after) ^ set(before))
    different = [name for name in before if after[name] != before[name]]
    assert not different, [
        (name, str(before[name])[:60], str(after[name])[:60]) for name in different
    ]


def identities(model: nn.Module) -> dict[str, int]:
    """Which objects a model consists of."""
    found = {name: id(module) for name, module in model.named_modules()}
    found |= {name: id(parameter) for name, parameter in model.named_parameters()}
    return found | {
        f"{name}:config": id(config_of(module))
        for name, module in model.named_modules()
        if config_of(module)
    }


def added(model: nn.Module, host: set[str]) -> list[nn.Parameter]:
    """The parameters that patches have added.

    Args:
        host: the names of the model's own parameters.
    """
    return [parameter for name, parameter in model.named_parameters() if name not in host]


def train(model: nn.Module, kind: Subject, host: set[str]) -> None:
    """A step of an optimizer over the parameters that patches have added."""
    loss = kind.run(model).float().square().mean()
    loss.backward()
    torch.optim.SGD(added(model, host), lr=1e-3).step()
    model.zero_grad(set_to_none=True)


def generated(model: Any) -> torch.Tensor:
    """Ids of greedy decoding through a cache."""
    return model.generate(IDS, max_new_tokens=3, do_sample=False)
