"""What a trial run shows of an unknown image tower: which of its tokens are patches, and in order.

Nothing is taken from names but what a learned token is called. The model itself is not touched:
what runs is a copy of its modules that shares the weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from biassurgery.adapters.image_tower import blocks_at
from biassurgery.adapters.libraries import is_fsdp
from biassurgery.adapters.probes import Probes, no_stream

Run = Callable[[nn.Module, Tensor], Any]


class Tokens(NamedTuple):
    """The tokens of an image tower, as a trial run showed them.

    Attributes:
        width: channels of the hidden states.
        patch: height and width in pixels of what becomes one token.
        before: the roles of the tokens in front of the patches.
        behind: those of the tokens behind them.
    """

    width: int
    patch: tuple[int, int]
    before: tuple[str, ...]
    behind: tuple[str, ...]


class _Enough(Exception):
    """The first block has been reached."""


class Watch(nn.Module):
    """Stands for a block, of which it has all attributes: keeps what that reads and returns.

    Args:
        block: runs, unless the run ends here; not a child, so that its mode stays what it is.
        seen: gets what the block reads or, where it runs, (block, what it reads, what it returns).
        ends: whether the run ends here.
    """

    def __init__(self, block: nn.Module, seen: list[Any], ends: bool = False) -> None:
        super().__init__()
        vars(self).update(block=block, seen=seen, ends=ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self.block).__name__
        read = _stream(kind, args[0] if args else kwargs.get("hidden_states"))
        if self.ends:
            self.seen.append(read)
            raise _Enough
        output = self.block(*args, **kwargs)
        self.seen.append((self.block, read, _stream(kind, output)))
        return output


def _stream(kind: str, given: Any) -> Tensor:
    """The hidden state (B, T, D) that a block is given or returns."""
    found = given[0] if isinstance(given, (tuple, list)) else given
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    if not isinstance(found, Tensor):
        raise no_stream(kind, f"what it reads or returns is {type(found).__name__}")
    if found.dim() != 3:
        what = "patches strung together" if found.dim() == 2 else "maps, or windows of them"
        raise no_stream(kind, f"it works on {tuple(found.shape)}, {what}")
    return found


# By what a parameter is called: the role of the tokens that it is.
ROLES = {
    "cls": re.compile(r"cls|class"),
    "distillation": re.compile(r"dist"),
    "register": re.compile(r"regist|storage|reg_tok"),
    "detection": re.compile(r"detect|det_tok"),
}
_known: WeakKeyDictionary[nn.Module, tuple[str, Tokens]] = WeakKeyDictionary()


def tokens_of(tower: nn.Module, path: str, probes: Probes, run: Run) -> Tokens:
    """The tokens of a tower; looked up where it has been tried before.

    Args:
        tower: reads pixels.
        path: of its blocks.
        probes: images of the size that it was made for.
        run: calls a tower on images.

    Raises:
        UnsupportedModel: it has no one stream of prefix tokens, patches row by row, and suffix
            tokens (B, T, D), or it cannot be told.
    """
    known = _known.get(tower)
    if known is None or known[0] != path:
        _known[tower] = known = path, _tried(tower, path, probes, run)
    return known[1]


@torch.no_grad()
def _tried(tower: nn.Module, path: str, probes: Probes, run: Run) -> Tokens:
    kind = type(tower).__name__
    if any(is_fsdp(module) for module in tower.modules()):
        raise no_stream(kind, "it is sharded; measure or patch it once before fully_shard")
    images = probes.one
    with _quiet(images.device):
        entered = _first_input(tower, path, probes.images, run)
        if len(entered) != len(probes.images):
            raise no_stream(
                kind,
                f"its blocks read {len(entered)} rows for {len(probes.images)} images: windows, or"
                " patches strung together",
            )
        first, last, grid = probes.patches(kind, entered)
        _check_stream(tower, path, probes.images[:2], run, entered)
        fixed = [at for at in range(entered.shape[1]) if not first <= at < last]
        roles = _roles(tower, path, images, run, fixed)
    size = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    before = tuple(role for at, role in zip(fixed, roles) if at < first)
    found = Tokens(entered.shape[2], size, before, tuple(roles[len(before) :]))
    _check_order(kind, found)
    return found


def _check_order(kind: str, tokens: Tokens) -> None:
    """Registers are one run in front of the patches; what is behind these has one role."""
    named = "".join("r" if role.startswith("register") else "-" for role in tokens.before)
    behind = set(tokens.behind)
    if "-" in named.strip("-"):
        raise no_stream(kind, f"its registers are apart, {', '.join(tokens.before)}")
    if len(behind) > 1 or any(role.startswith("register") for role in behind):
        raise no_stream(kind, f"behind its patches are {', '.join(sorted(behind))}")
    if behind & set(tokens.before):
        raise no_stream(kind, f"{', '.join(behind)} is before and behind its patches")


def _first_input(
    tower: nn.Module,
    path: str,
    images: Tensor,
    run: Run,
    changed: Mapping[int, nn.Parameter] | None = None,
) -> Tensor:
    """What the first block reads (N, T, D), with some parameters changed, by their ids."""
    seen: list[Any] = []
    copied = _copied(tower, path, lambda block: Watch(block, seen, ends=True), changed)
    with suppress(_Enough):
        run(copied, images)
    if not seen:
        raise no_stream(type(tower).__name__, f"its blocks ({path}) did not run on images")
    return seen[0]


def _check_stream(tower: nn.Module, path: str, images: Tensor, run: Run, entered: Tensor) -> None:
    """Each block runs once, in order, on what the one before it returned (N, T, D).

    Between two of them a constant may be added (YOLOS adds positions), the same in every image.
    """
    kind = type(tower).__name__
    seen: list[Any] = []
    run(_copied(tower, path, lambda block: Watch(block, seen)), images)
    blocks = list(tower.get_submodule(path).children())
    if [block for block, _, _ in seen] != blocks:
        raise no_stream(kind, "its blocks do not run once each, one after the other")
    states = [seen[0][1], *(returned for _, _, returned in seen)]
    shapes = {tuple(state.shape) for state in states}
    if shapes != {(len(images), *entered.shape[1:])}:
        raise no_stream(kind, f"its hidden states are {', '.join(map(str, sorted(shapes)))}")
    for (_, read, _), (_, _, returned) in zip(seen[1:], seen):
        added = (read - returned.to(read.device)).float()
        rounding = 8 * torch.finfo(read.dtype).eps * read.abs().amax().float()
        if read is not returned and not ((added - added[:1]).abs() <= rounding).all():
            raise no_stream(kind, "between two blocks something else changes what they hand on")


def _roles(tower: nn.Module, path: str, images: Tensor, run: Run, fixed: list[int]) -> list[str]:
    """The role of each token that is the same in every image: which parameter it comes from."""
    plain = _first_input(tower, path, images, run)
    found: dict[int, str] = {}
    inside = {id(p) for block in blocks_at(tower, path) for p in block.parameters()}
    for name, parameter in tower.named_parameters():
        role = role_of(name.rpartition(".")[2])
        if role is None or id(parameter) in inside or parameter.shape[-1] != plain.shape[-1]:
            continue
        other = nn.Parameter(parameter + torch.randn_like(parameter))
        moved = _first_input(tower, path, images, run, {id(parameter): other}) != plain
        at = [token for token in fixed if moved[0, token].any()]
        if set(at) & set(found) or moved.any(-1).sum() != len(at):
            raise no_stream(type(tower).__name__, f"{name} is more than tokens of its own")
        found.update(
            (token, f"{role}:{i}" if _numbered(role, at) else role) for i, token in enumerate(at)
        )
    missing = [token for token in fixed if token not in found]
    if missing:
        raise no_stream(
            type(tower).__name__,
            f"tokens {missing} are the same in every image, and no parameter that is called a"
            " class, register, distillation or detection token is what they come from",
        )
    return [found[token] for token in fixed]


def role_of(name: str) -> str | None:
    """The role of the tokens that a parameter of this name holds; None: it is not known."""
    return next((role for role, pattern in ROLES.items() if pattern.search(name)), None)


def _numbered(role: str, at: list[int]) -> bool:
    """Registers are numbered, also where there is one; class tokens where there are several."""
    return role == "register" or (role == "cls" and len(at) > 1)


def _copied(
    tower: nn.Module,
    path: str,
    watch: Callable[[nn.Module], nn.Module],
    changed: Mapping[int, nn.Parameter] | None = None,
) -> nn.Module:
    """A copy of the modules of a tower in evaluation mode, with its weights and accelerate's hooks.

    In the place of its blocks are others.
    """
    shared = [*tower.parameters(), *tower.buffers()]
    shared += [hook for m in tower.modules() if (hook := getattr(m, "_hf_hook", None)) is not None]
    memo: dict[int, Any] = {id(one): one for one in shared}
    memo.update(changed or {})
    memo.update((id(block), watch(block)) for block in tower.get_submodule(path).children())
    return copy.deepcopy(tower, memo).eval()


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Within the block no random numbers are used up, and no compiled code runs."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        yield
