"""Super weights: single weights that write much of a massive activation.

Source: Yu et al. 2024, "The Super Weight in Large Language Models". A matrix writes y = W x into
the residual stream; at a token whose channel c is massive, the entry W[c, j] contributes
W[c, j] * x[j]. A few entries make nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.linears import Linear, linears, outputs_of, weights_of
from biassurgery.adapters.offloaded import brought, offloaded_in
from biassurgery.adapters.registry import Host
from biassurgery.findings.diagnosed import SuperWeight
from biassurgery.findings.site import Site
from biassurgery.measure.observe import Observer
from biassurgery.surgery.edit import Place
from biassurgery.surgery.linear import OutputEdit

SHARE = 0.2  # of what its matrix writes, from which on a weight is one
STANDS_OUT = 10.0  # medians of what a matrix writes at a token, beyond which it writes the channel
_MOST = 4  # weights of one channel of one matrix


class Written(NamedTuple):
    """A massive value of the sequence at the block that writes it."""

    channel: int
    token: int
    growth: float


class Writers:
    """Watches what could write the massive activations of one sequence, where they are born.

    Args:
        host: the model.
        sites: the massive activations.
        left_out: names of linear layers that read some tokens only, and so are not looked at.
    """

    def __init__(self, host: Host, sites: Iterable[Site], left_out: Collection[str] = ()) -> None:
        self.host = host
        born = [site for site in sites if site.first is not False]
        self.sites: dict[int, list[Site]] = {}
        for site in born:
            self.sites.setdefault(site.layer, []).append(site)
        self.linears = [
            linear
            for linear in linears(host)
            if linear.layer in self.sites
            and linear.name not in left_out
            and outputs_of(linear.module) == host.width
        ]
        self.edits = [_Watch() for _ in self.linears]
        self.states: dict[tuple[str, int], Tensor] = {}
        self.notes: list[str] = []

    def places(self) -> list[Place]:
        """Observers of the linear layers, and of what their blocks read and return."""
        places = [
            Place(linear.layer, linear.module, edit)
            for linear, edit in zip(self.linears, self.edits)
        ]
        for layer in self.sites:
            ends: tuple[Literal["input", "output"], ...] = ("input", "output")
            for at in ends:
                edit = Observer(layer, self.host.layout, self._keeper(at), at)
                places.append(Place(layer, self.host.blocks[layer], edit))
        return places

    def _keeper(self, at: str) -> Callable[[int, Tensor], None]:
        def keep(layer: int, hidden: Tensor) -> None:
            self.states[at, layer] = hidden[0].detach().float()

        return keep

    def found(self, sequence: Mapping[str, Any]) -> list[SuperWeight]:
        """The weights, those that contribute most first, after a run of the sequence."""
        weights: dict[str, SuperWeight] = {}
        adapter = self.host.adapter
        for layer, sites in self.sites.items():
            tokens = len(self.states["output", layer])
            roles = adapter.token_roles(self.host.model, sequence, (1, tokens))[0].cpu()
            for written in self._written(layer, sites, roles):
                for weight in self._weights(layer, written):
                    known = weights.get(weight.place)
                    if known is None or abs(weight.contribution) > abs(known.contribution):
                        weights[weight.place] = weight
        return sorted(weights.values(), key=lambda weight: -abs(weight.contribution))

    def _written(self, layer: int, sites: Iterable[Site], roles: Tensor) -> Iterator[Written]:
        """The largest massive value of each site, and by how much the block has changed it."""
        before = self.states["input", layer]
        after = self.states["output", layer]
        for site in sites:
            column = after[:, site.channel].cpu().abs()
            column = column.masked_fill(roles != self.host.roles.index(site.role), 0)
            column = column.masked_fill(roles == PADDING, 0)
            token = int(column.argmax())
            if column[token] > (site.gate or abs(site.mean) / 2):
                growth = (after - before)[token, site.channel].item()
                yield Written(site.channel, token, growth)

    def _weights(self, layer: int, written: Written) -> Iterator[SuperWeight]:
        """The entries of the matrix of a block that writes most of a massive value."""
        chosen = None
        most = STANDS_OUT
        tokens = len(self.states["output", layer])
        for linear, edit in zip(self.linears, self.edits):
            if linear.layer != layer or edit.y is None or len(edit.y) != tokens:
                continue  # experts read some tokens only, and not in their order
            y = edit.y[written.token].abs()
            prominence = (y[written.channel] / y.median().clamp(min=1e-30)).item()
            if prominence > most:
                chosen, most = (linear, edit), prominence
        if chosen is None:
            self.notes.append(
                f"super weights: no linear layer of block {layer} stands out in channel"
                f" {written.channel}, so what writes it there is not known (experts are not read)"
            )
            return
        yield from self._entries(*chosen, written)

    def _entries(self, linear: Linear, edit: _Watch, written: Written) -> Iterator[SuperWeight]:
        with brought(offloaded_in(linear.module)):
            weights = weights_of(linear.module)
        if weights is None:
            self.notes.append(f"super weights: the weights of {linear.name} are packed")
            return
        row = weights[written.channel]
        assert edit.x is not None  # it has run
        assert edit.y is not None
        parts = row * edit.x[written.token].to(row.device)
        total = edit.y[written.token, written.channel].item()
        for column in parts.abs().topk(min(_MOST, len(parts))).indices.tolist():
            share = parts[column].item() / total
            if share >= SHARE:
                yield SuperWeight(
                    linear.name,
                    linear.layer,
                    written.channel,
                    column,
                    row[column].item(),
                    share * written.growth,
                    share,
                )


class _Watch(OutputEdit):
    """Keeps what a linear layer read (T, D) and returned (T, N) for one sequence."""

    x: Tensor | None = None
    y: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.x = x.detach().reshape(-1, x.shape[-1]).float()
        self.y = y.detach().reshape(-1, y.shape[-1]).float()
        return y


class Without(OutputEdit):
    """Takes away what one weight contributes; the weight itself is not touched."""

    def __init__(self, weight: SuperWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., self.weight.row] -= self.weight.value * x[..., self.weight.column]
        return y


def without(host: Host, weight: SuperWeight) -> Place:
    """The edit that stands for a weight of zero."""
    return Place(weight.layer, host.root.get_submodule(weight.name), Without(weight))
