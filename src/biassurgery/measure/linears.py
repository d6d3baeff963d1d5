"""How large what every linear layer reads and returns is, with and without massive tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.linears import linears
from biassurgery.adapters.overflow import what_to_do
from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation
from biassurgery.findings.diagnosed import LinearRange, Token
from biassurgery.findings.tally import role_of
from biassurgery.measure.candidates import Candidates, Found
from biassurgery.measure.carriers import strongest
from biassurgery.measure.layer_sinks import Marked
from biassurgery.measure.sequences import Sequences
from biassurgery.measure.statistic import BlockOutput, Statistic
from biassurgery.surgery.edit import Place
from biassurgery.surgery.linear import OutputEdit

ORDINARY = "ordinary"


class RangeEdit(OutputEdit):
    """Keeps the largest magnitude of each token in what a linear layer reads, and returns.

    What several layers read (queries, keys and values) is looked at once.

    Attributes:
        read, returned: (...) of the last forward; None: it has not run. Layers that run more than
            once in a forward, on tensors of one shape, keep the larger.
        reads_others: whether it has read what a batch gives beside its tokens: cross-attention
            reads an encoder's, which are others even where they are as many.
    """

    def __init__(
        self, last: list[tuple[Tensor, int | None, Tensor]], others: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.last = last
        self.others = others
        self.reads_others = False
        self.read: Tensor | None = None
        self.returned: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if any(x.data_ptr() == other.data_ptr() for other in self.others):
            self.reads_others = True
            return y
        # Tensors of inference mode do not count their changes, and are looked at every time.
        version = None if x.is_inference() else x._version
        same = self.last and self.last[0][0] is x and self.last[0][1] == version is not None
        read = self.last[0][2] if same else _largest(x)
        self.last[:] = [(x, version, read)]
        self.read = _larger(self.read, read)
        self.returned = _larger(self.returned, _largest(y))
        return y


class Most(NamedTuple):
    """The largest that a linear layer has read of all tokens: its value, and whose it was."""

    value: float
    token: Token


class LinearRanges(Statistic):
    """The ranges of every linear layer, by kind of token.

    Which tokens carry massive activations is known when all data have been read. So the maxima of
    all tokens of a batch are kept until its end, and those of tokens that may turn out to carry
    some by what the tally calls their values; the end decides.

    Args:
        host: the model.
        candidates: of its massive activations, which are counted in the same pass.
        tokenizer: gives tokens their text; None: they have none.
    """

    in_batch = ("_peaks", "_roles")

    def __init__(self, host: Host, candidates: Candidates, tokenizer: Any = None) -> None:
        super().__init__(host)
        self.candidates = candidates
        self.tokenizer = tokenizer
        self.linears = linears(host)
        self._last: list[tuple[Tensor, int | None, Tensor]] = []
        self._others: list[Tensor] = []
        self.edits = [RangeEdit(self._last, self._others) for _ in self.linears]
        nothing = torch.zeros(len(self.linears), device="cpu")
        self.groups: dict[frozenset[int], Tensor] = {frozenset(): nothing}
        self.counts = Counter[frozenset[int]]()
        self.most: dict[str, Most] = {}
        self.returned: dict[str, float] = {}
        self.residual: dict[int, float] = {}
        self.unplaced: set[str] = set()

    def places(self) -> list[Place]:
        return [
            Place(linear.layer, linear.module, edit)
            for linear, edit in zip(self.linears, self.edits)
        ]

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._batch = batch
        given = [value for name, value in batch.items() if name != "inputs_embeds"]
        self._others[:] = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
        self._found: list[tuple[Found, Tensor]] = []
        self._peaks: dict[int, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self._last.clear()
        for edit in self.edits:
            edit.read = edit.returned = None

    def see(self, output: BlockOutput) -> None:
        found = self.candidates.of(output)
        if len(found.key):
            self._found.append((found, output.threshold.cpu()))
        self._peaks[output.layer] = output.peak.amax()
        self._roles = output.roles

    def suspend(self) -> dict[str, Any]:
        found = [(tuple(found), threshold) for found, threshold in self._found]
        ranges = {
            index: (edit.read, edit.returned)
            for index, edit in enumerate(self.edits)
            if edit.read is not None
        }
        return super().suspend() | {"_found": found, "ranges": ranges}

    def resume(self, known: Mapping[str, Any]) -> None:
        super().resume(known)
        self._found = [(Found(*found), threshold) for found, threshold in known["_found"]]
        for index, (read, returned) in known["ranges"].items():
            self.edits[index].read = read
            self.edits[index].returned = returned

    def end(self) -> None:
        roles = self._roles.cpu()
        width = self.host.width
        found = strongest(self._found, len(self.host.roles), width, roles.shape[1])
        marked = Marked.of(found, roles.shape)
        groups = [frozenset[int](), *marked.groups]
        codes = (1 + marked.group).masked_fill(roles == PADDING, -1)
        for code, keys in enumerate(groups):
            self.counts[keys] += int((codes == code).sum())
        for layer, peak in self._peaks.items():
            self.residual[layer] = max(self.residual.get(layer, 0.0), peak.item())
        ran = [
            (index, read, returned)
            for index, edit in enumerate(self.edits)
            for read, returned in [self._by_token(index, edit, roles.shape)]
            if read is not None and returned is not None
        ]
        if ran:
            self._count([index for index, _, _ in ran], groups, codes, *_stacked(ran))
        self._forget()

    def _by_token(
        self, index: int, edit: RangeEdit, shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, T) each; None: the layer did not run, or on other tokens, as experts do."""
        if edit.reads_others:
            self.unplaced.add(self.linears[index].name)
        if edit.read is None or edit.returned is None:
            return None, None
        read = placed(edit.read, shape, self.host.layout)
        returned = placed(edit.returned, shape, self.host.layout)
        if read is None or returned is None:
            self.unplaced.add(self.linears[index].name)
        return read, returned

    def _count(
        self,
        ran: list[int],
        groups: list[frozenset[int]],
        codes: Tensor,
        read: Tensor,
        returned: Tensor,
    ) -> None:
        """Take the maxima (L, B, T) of the layers that ran; codes (B, T) say whose they are."""
        read = read.masked_fill(codes < 0, 0)
        returned = returned.masked_fill(codes < 0, 0)
        self._check_finite(ran, read, returned)
        whose = codes.clamp(min=0).flatten().expand(len(ran), -1)
        largest = torch.zeros(len(ran), len(groups), device="cpu")
        largest = largest.scatter_reduce(1, whose, read.flatten(1), "amax")
        at = torch.tensor(ran, device="cpu")
        for keys, column in zip(groups, largest.unbind(1)):
            before = self.groups.get(keys, torch.zeros(len(self.linears), device="cpu"))
            self.groups[keys] = before.index_copy(0, at, torch.maximum(before[at], column))
        values, where = read.flatten(1).max(1)
        for index, value, place in zip(ran, values.tolist(), where.tolist()):
            name = self.linears[index].name
            if name not in self.most or value > self.most[name].value:
                self.most[name] = Most(value, self._token(*divmod(place, codes.shape[1])))
        for index, value in zip(ran, returned.flatten(1).amax(1).tolist()):
            name = self.linears[index].name
            self.returned[name] = max(self.returned.get(name, 0.0), value)

    def _check_finite(self, ran: list[int], *maxima: Tensor) -> None:
        for values in maxima:
            for index, finite in zip(ran, values.isfinite().flatten(1).all(1).tolist()):
                if not finite:
                    raise NonFiniteActivation(
                        f"batches: what {self.linears[index].name} reads or returns holds NaN or"
                        f" infinity; {what_to_do(self.host)}."
                    )

    def _token(self, row: int, token: int) -> Token:
        """What stands at a place of the batch at hand."""
        role = self.host.roles[int(self._roles[row, token])]
        if self.host.adapter.modality == "image":
            return Token(role, token)
        sequences = Sequences.read(self.host, self._batch)
        start = int(sequences.starts[row, sequences.of[row, token]])
        ids = self._batch.get("input_ids")
        if ids is None:
            return Token(role, token - start)
        word = int(ids[row, token])
        text = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(word)
        return Token(role, token - start, word, text)

    def carriers(self) -> dict[str, int]:
        """How many tokens of each role carry massive activations."""
        counts = dict.fromkeys(self.host.roles, 0)
        for keys, kind in self._kinds().items():
            if kind != ORDINARY:
                counts[kind] += self.counts[keys]
        return counts

    def _kinds(self) -> dict[frozenset[int], str]:
        """What the tokens of each group are: the role of those that carry some, or ordinary."""
        massive = self.candidates.massive.massive_keys()
        roles = self.host.roles
        return {
            keys: ORDINARY if massive.isdisjoint(keys) else roles[role_of(min(keys), len(roles))]
            for keys in self.groups
        }

    def result(self) -> tuple[LinearRange, ...]:
        by_kind: dict[str, Tensor] = {}
        for keys, kind in self._kinds().items():
            largest = self.groups[keys]
            by_kind[kind] = torch.maximum(by_kind.get(kind, largest), largest)
        return tuple(
            self._range(index, {kind: values[index].item() for kind, values in by_kind.items()})
            for index, linear in enumerate(self.linears)
            if linear.name in self.most and linear.name not in self.unplaced
        )

    def _range(self, index: int, kinds: dict[str, float]) -> LinearRange:
        name, layer, _ = self.linears[index]
        largest, token = self.most[name]
        return LinearRange(name, layer, largest, kinds[ORDINARY], token, kinds, self.returned[name])


def placed(values: Tensor, shape: torch.Size, layout: str = "BTD") -> Tensor | None:
    """Values of tokens as (B, T), or None if it cannot be told whose they are.

    Args:
        values: (B, T), (T, B) where the layout of the host says so, or (B * T,) of both.
        shape: B and T.
        layout: of the host's hidden states.
    """
    rows, tokens = shape
    turned = layout.index("T") < layout.index("B")
    if tuple(values.shape) == ((tokens, rows) if turned else (rows, tokens)):
        return values.T if turned else values
    if tuple(values.shape) in ((rows * tokens,), (1, rows * tokens)) and not turned:
        return values.reshape(rows, tokens)
    return None


def _stacked(ran: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(L, B, T) float32 on the CPU: what the layers read and returned; one copy brings both."""
    device = ran[0][1].device
    both = torch.stack(
        [torch.stack([read.to(device), returned.to(device)]).float() for _, read, returned in ran]
    ).cpu()
    return both[:, 0], both[:, 1]


def _largest(x: Tensor) -> Tensor:
    """(...,) the largest magnitude along the channels of (..., D)."""
    x = x.detach()
    return torch.maximum(x.amax(-1), -x.amin(-1))  # on CPUs five times as fast as abs or aminmax


def _larger(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None or before.shape != now.shape else torch.maximum(before, now)
