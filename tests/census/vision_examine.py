"""What the fallback must do with one type that reads images, checked on a tiny random model in
which massive values are planted, and the committed outcome.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import Host, find_host
from biassurgery.errors import UnsupportedModel
from tests.census.examine import ROWS, attention
from tests.census.timm_examine import ImageExamination, probabilities
from tests.census.tiny import MAJOR
from tests.census.vision_tiny import classes, images_for, tiny_model, vision_config
from tests.state import untouched

FILE = Path(__file__).parent / f"vision_{MAJOR}.json"
RIGHT = "right"
CELLS = ("activations", "planted", "attention", "registers")
CHANNEL = 9
VALUE = 3000.0
BORN = 1  # the block that a planted value is in the input of
PLACE = (1, 2)  # row and column of the patch that holds one


@dataclass(frozen=True)
class Outcome:
    """What came out for one type.

    Attributes:
        refused: why no tower of images is served, or why it is not built; None: one is.
        built: transformers can make a model of the type.
        tower: what must be named for it; None: nothing.
        model: the class that is operated on.
        roles: of its tokens.
        cells: for each of `CELLS` `right`, or `refused: ` and why.
    """

    built: bool
    refused: str | None = None
    tower: str | None = None
    model: str = ""
    roles: str = ""
    cells: dict[str, str] | None = None


_examined: dict[Any, Outcome] = {}  # of one class of tower, alone or in another model, one stands


def examine(model_type: str) -> Outcome:
    """Build a tiny model of the type and check all cells; a wrong number is an error.

    Raises:
        AssertionError: the library served the model, but wrongly.
    """
    try:
        model = tiny_model(model_type)
    except Exception as error:  # noqa: BLE001 whatever transformers raises
        return Outcome(False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
    try:
        host = find_host(model, "vision")
    except (UnsupportedModel, bs.errors.BadOption) as refusal:
        return Outcome(True, said(refusal))
    key = type(host.model), host.tower
    roles = ", ".join(host.roles)
    if key in _examined:
        return replace(_examined[key], roles=roles)
    subject = Subject(host)
    with untouched(model):
        cells = subject.cells()
    _examined[key] = Outcome(True, None, host.tower, type(host.model).__name__, roles, cells)
    return _examined[key]


def said(refusal: Exception) -> str:
    """A refusal without what is different from one kind of model to the next."""
    first = str(refusal).split("\n")[0]
    return first.replace(", or leave tower= out", "").split(". Known families")[0]


class Subject:
    """One tower of images with what it is run on."""

    def __init__(self, host: Host) -> None:
        self.host = host
        with torch.no_grad():  # so that each part has an effect; some types begin with next to 0
            for parameter in host.model.parameters():
                if parameter.dim() > 1 and parameter.numel():
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        self.arguments, self.images = images_for(host.model, ROWS)

    @torch.no_grad()
    def output(self, arguments: dict[str, Any] | None = None) -> Tensor:
        """What the tower makes of its images: the last of its hidden states."""
        torch.manual_seed(0)
        return last_of(self.host.model(**(arguments or self.arguments)))

    def cells(self) -> dict[str, str]:
        host = self.host
        ImageExamination(host, self.images, self.own(), self.output).run()
        refused = attention(host.root, self.output, tower=host.tower)
        if refused is None:
            probabilities(host.root, self.output, host.tower)
        planted = self.planted()
        return {
            "activations": RIGHT,
            "planted": planted,
            "attention": cell(refused),
            "registers": self.registers(),
        }

    def own(self) -> list[Tensor]:
        """The hidden state behind each block, by hooks of torch."""
        seen: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, output: seen.append(tensor_of(output)))
            for block in self.host.blocks
        ]
        self.output()
        for hook in hooks:
            hook.remove()
        return seen

    @torch.no_grad()
    def token_of(self, row: int, column: int) -> int:
        """The token of a patch: the one that another picture there changes most."""
        pixels = self.arguments["pixel_values"]
        changed = pixels.clone()
        if pixels.dim() == 4:
            down, across = (size // count for size, count in zip(pixels.shape[-2:], self.grid()))
            changed[
                ..., row * down : (row + 1) * down, column * across : (column + 1) * across
            ] += 3
        else:  # packed, row by row
            changed[:, row * self.grid()[1] + column] += 3
        first: list[Tensor] = []
        hook = self.host.blocks[0].register_forward_pre_hook(
            lambda _, given, named: first.append(read_of(given, named).clone()), with_kwargs=True
        )
        self.output()
        self.output({**self.arguments, "pixel_values": changed})
        hook.remove()
        return int((first[1] - first[0]).abs().sum((0, 2)).argmax())

    def grid(self) -> tuple[int, int]:
        """By what the config says, or the batch."""
        if "spatial_shapes" in self.arguments:
            rows, columns = self.arguments["spatial_shapes"][0].tolist()
            return rows, columns
        config = vision_config(self.host.model)
        size, patch = (pair(getattr(config, name)) for name in ("image_size", "patch_size"))
        return size[0] // patch[0], size[1] // patch[1]

    def planted(self) -> str:
        """Values in the input of a block are found at the outputs of that and of those behind it,
        with role and place, and written over.
        """
        host = self.host
        tokens = {self.token_of(*PLACE): "patch"}
        if host.roles[0] != "patch":
            tokens[0] = host.roles[0]
        with plant(host.blocks[BORN], list(tokens)):
            found = bs.detect(host.root, self.images, tower=host.tower, progress=False)
            places = {(site.layer, site.channel, site.role) for site in found.sites}
            layers = range(BORN, len(host.blocks))
            assert places == {(at, CHANNEL, role) for at in layers for role in tokens.values()}
            assert all(abs(site.mean / VALUE - 1) < 0.05 for site in found.sites)
            assert found.grid == self.grid()
            for position in found.positions:
                assert position.count == ROWS
                role = tokens[position.position]
                assert (position.token, position.patch) == (
                    role,
                    PLACE if role == "patch" else None,
                )
            with_values = self.own()
            with (
                bs.patched(host.root, "set_zero", sites=found.sites, tower=host.tower),
                bs.record(host.root, "block_output", tower=host.tower) as rec,
            ):
                self.output()
            assert (with_values[BORN][..., CHANNEL].abs() > VALUE / 2).sum() == ROWS * len(tokens)
            for at in layers:
                assert rec["block_output"][at][..., CHANNEL].abs().amax() < VALUE / 10
        return RIGHT

    def registers(self) -> str:
        """Zero in the place of registers, at the input of every block, and nowhere else."""
        host = self.host
        try:
            with (
                bs.patched(host.root, "fix_registers", fill="zero", tower=host.tower),
                bs.record(host.root, "block_input", tower=host.tower) as rec,
            ):
                self.output()
        except bs.SurgeryError as refusal:
            return cell(said(refusal))
        where = [at for at, role in enumerate(host.roles) if role.startswith("register")]
        for state in rec["block_input"].values():
            zero = (state == 0).all(-1).all(0).nonzero().flatten().tolist()
            assert zero == where
        return RIGHT


def plant(block: nn.Module, tokens: list[int]) -> Any:
    """Within the block, what this module reads has `VALUE` in one channel of these tokens."""

    def write(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden = read_of(given, named).clone()
        hidden[:, tokens, CHANNEL] = VALUE
        if given:
            return (hidden, *given[1:]), named
        return given, {**named, "hidden_states": hidden}

    return block.register_forward_pre_hook(write, with_kwargs=True)


def read_of(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden state that a block reads."""
    return given[0] if given else named["hidden_states"]


def cell(refused: str | None) -> str:
    return RIGHT if refused is None else f"refused: {refused}"


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def last_of(returned: Any) -> Tensor:
    """The last hidden state in what a model returned."""
    if isinstance(returned, Tensor):
        return returned
    names = ("last_hidden_state", "feature_maps", "logits", "predicted_depth")
    found = next(value for name in names if (value := getattr(returned, name, None)) is not None)
    return found if isinstance(found, Tensor) else found[-1]


def pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def read() -> dict[str, Any]:
    """The committed outcome: the version, and by type `not_built`, `refused`, `served`."""
    return json.loads(FILE.read_text())


def written(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Outcomes as they are committed."""
    return {
        "transformers": transformers.__version__,
        "not_built": {name: o.refused for name, o in outcomes.items() if not o.built},
        "refused": {name: o.refused for name, o in outcomes.items() if o.built and o.refused},
        "served": {
            name: {"tower": o.tower, "model": o.model, "roles": o.roles, **o.cells}
            for name, o in outcomes.items()
            if o.cells is not None
        },
    }


def write(outcomes: dict[str, Outcome]) -> None:
    """Replace the committed outcome of this major version."""
    FILE.write_text(json.dumps(written(outcomes), indent=1) + "\n")


def totals(found: dict[str, Any]) -> tuple[int, ...]:
    """Of a committed outcome: types, built, served, served by name, and right in each cell."""
    served = found["served"]
    built = len(found["refused"]) + len(served)
    by_name = sum(row["tower"] is not None for row in served.values())
    right = (sum(row[cell] == RIGHT for row in served.values()) for cell in CELLS)
    return (built + len(found["not_built"]), built, len(served), by_name, *right)


TYPES = tuple(sorted(classes()))
