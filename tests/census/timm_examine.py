"""What the adapters of timm must do with one structure, and the committed outcome."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.registry import Tower, find_host
from biassurgery.errors import UnsupportedModel
from tests.census.examine import KINDS, ROWS, Examination, attention
from tests.census.timm_models import REFUSED, Structure, classes
from tests.state import untouched

FILE = Path(__file__).parent / "timm.json"
# of the explicit write
VALUE = 7.0
CHANNELS = (1, 5)
POSITIONS = (0, 3)
OTHERS = tuple(kind for kind in KINDS if kind != "gate")


@dataclass(frozen=True)
class Outcome:
    """What came out for one structure that is served.

    Attributes:
        attention: why modes on its attention are not; None: they are.
        gate: why the gate, which needs what the attention reads, is not.
    """

    attention: str | None
    gate: str | None


def examine(structure: Structure) -> Outcome:
    """Build it and check all that `Examination` does; a refusal of a mode on attention is an
    outcome, a wrong number an error.

    Raises:
        AssertionError: the library served the model, but wrongly.
        UnsupportedModel: no adapter serves it.
    """
    model = structure.model()
    images = structure.images(ROWS)
    host = find_host(model)

    @torch.no_grad()
    def output() -> Tensor:
        return model.forward_features(images)  # of all tokens; some heads read the first one only

    with untouched(model, images):
        ImageExamination(host, images, hidden_states(model, images), output).run()
        refused = attention(model, output, OTHERS)
        gate = attention(model, output, ("gate",))
        if refused is None:
            probabilities(model, lambda: model(images))
    return Outcome(refused, gate)


def refusal(name: str) -> str:
    """How the library refuses an architecture, of which no more than the skeleton is made."""
    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        find_host(model)
    except UnsupportedModel as refused:
        return str(refused).split(". ")[0].rstrip(".") + "."
    raise AssertionError(
        f"{name} is served: move its class to SERVED of tests/census/timm_models.py"
    )


@torch.no_grad()
def hidden_states(model: Any, images: Tensor) -> list[Tensor]:
    """The output (B, T, D) of every block, as the model itself reports it."""
    prefix = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
    states = model.forward_intermediates(
        images, output_fmt="NLC", intermediates_only=True, **prefix
    )
    return [torch.cat(state[::-1], 1) if prefix else state for state in states]


@torch.no_grad()
def probabilities(model: Any, run: Callable[[], Any], tower: Tower | None = None) -> None:
    """Each query's attention sums to one, with the share of the bias where there is one."""
    with bs.record(model, "probs", tower=tower) as plain:
        run()
    with (
        bs.patched(model, "attention_bias", init="normal", std=1.0, tower=tower),
        bs.record(model, ("probs", "bias_mass"), tower=tower) as biased,
    ):
        run()
    for layer, probs in plain["probs"].items():
        one = torch.ones(probs.shape[:-1])
        torch.testing.assert_close(probs.sum(-1), one)
        torch.testing.assert_close(biased["probs"][layer].sum(-1) + biased["bias_mass"][layer], one)
        assert biased["bias_mass"][layer].amin() > 0


class ImageExamination(Examination):
    """The same on images, and explicit writes at positions."""

    def run(self) -> None:
        super().run()
        for layer in range(len(self.hidden)):
            self.writes_at_positions(layer)
        assert torch.equal(self.forward(), self.plain)

    def same(self, output: Tensor) -> None:
        if all(hidden.is_contiguous() for hidden in self.hidden):
            super().same(output)
        # channels first in memory (DeepSeek), which an edit changes, and with it the order of sums
        else:
            torch.testing.assert_close(output, self.plain, rtol=1e-5, atol=1e-5)

    def identity(self) -> None:
        assert torch.equal(self.logits, self.plain)
        assert len(self.own) == len(self.hidden) == len(self.host.blocks)
        for own, hidden in zip(self.own, self.hidden):
            assert torch.equal(own, hidden)
            assert hidden.shape[-1] == self.host.width
            assert hidden.shape[1] > len(self.host.roles)  # patches beside the prefix

    def writes_at_positions(self, layer: int) -> None:
        expected = self.hidden[layer].clone()
        # What a model returns may leave out the tokens in front.
        positions = sorted({*POSITIONS, self.host.roles.index("patch")})
        for position in positions:
            expected[:, position, CHANNELS] = VALUE
        with bs.patched(
            self.model,
            "set_value",
            value=VALUE,
            channels=CHANNELS,
            positions=positions,
            layers=[layer],
            tower=self.host.tower,
        ):
            changed = self.outputs()
        assert torch.equal(changed[layer], expected)
        assert all(torch.equal(a, b) for a, b in zip(changed[:layer], self.hidden))
        assert (self.logits - self.plain).abs().amax() / self.plain.std() > 1e-4


def read() -> dict[str, Any]:
    """The committed outcome.

    `timm`: the version; `architectures`: how many it has; `structures`: their names by structure;
        `attention_not_served` and
    `gate_not_served`: reasons by structure; `not_served`: the reason and the names by class.
    """
    return json.loads(FILE.read_text())


def write_outcomes(outcomes: dict[Structure, Outcome]) -> None:
    """Replace the committed outcome."""
    found = {
        "timm": timm.__version__,
        "architectures": len(classes()),
        "structures": {structure.text: structure.names for structure in outcomes},
        "attention_not_served": {
            structure.text: outcome.attention
            for structure, outcome in outcomes.items()
            if outcome.attention
        },
        "gate_not_served": {
            structure.text: outcome.gate for structure, outcome in outcomes.items() if outcome.gate
        },
        "not_served": {
            kind: {"reason": refusal(names[0]), "names": names} for kind, names in refused().items()
        },
    }
    FILE.write_text(json.dumps(found, indent=2) + "\n")


def refused() -> dict[str, list[str]]:
    """The architectures of each class that is not served."""
    return {
        kind: [name for name, (cls, _) in classes().items() if cls.__name__ == kind]
        for kind in REFUSED
    }
