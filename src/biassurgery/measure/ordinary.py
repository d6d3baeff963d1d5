"""`ordinary_tokens`: the tokens of a batch that neither carry massive activations nor are sinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import PADDING
from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_inputs
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.candidates import Candidates, Found
from biassurgery.measure.layer_sinks import mean_weights
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.sequences import Sequences
from biassurgery.measure.statistic import BlockOutput, Statistic
from biassurgery.measure.together import together
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place
from biassurgery.surgery.shares import shares

_AT_ONCE = 32  # keys whose shares are in memory together
_QUERIES = 8  # others that must see a token, for their mean to say that it is a sink


def ordinary_tokens(
    model: nn.Module,
    batch: Batch,
    *,
    min_share: float | None = 0.3,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    tower: Tower | None = None,
) -> Tensor:
    """Which tokens of a batch carry no massive activation and are no attention sinks.

    For those who train sparse autoencoders, probes or steering vectors, and mask the others by
    hand. A token carries a massive activation if a value of it, at the output of any block, is
    beyond the gate that `calibrate` would find on this batch; it is a sink if in any layer the
    tokens that see it, itself left out, pay it more than `min_share` of their attention, as a mean
    over them and over heads. A token that fewer than 8 others see is not called a sink.

    Args:
        model: a model of a supported architecture.
        batch: one batch: a tensor (`input_ids` (B, T) int64 or `pixel_values` (B, C, H, W)), a dict
            of the model's arguments, or a pair with labels. Sequences of some tens of tokens or
            more: one of its massive token alone does not show that it is one.
        min_share: of the attention, more than 0 and less than 1; None: sinks are not looked for,
            as where the attention of a model cannot be read.
        min_magnitude, min_ratio: the definition of a massive activation, see `calibrate`.
        tower: `vision` (default) or `text`, of a model that has both.

    Returns:
        (B, T) bool on the model's device, False at padding; in images T counts [CLS] and registers.

    Raises:
        UnsupportedModel: also if the attention of a layer does not reach this library's core.
        BadBatch, BadOption, NonFiniteActivation: see their messages; the model is as it was.
    """
    with together("ordinary_tokens", model):
        host = find_host(model, tower)
        check_measurable(host, min_magnitude, min_ratio)
        if min_share is not None and (
            isinstance(min_share, bool)
            or not isinstance(min_share, (int, float))
            or not 0 < min_share < 1
        ):
            raise BadOption(f"min_share: {min_share!r}; give a number between 0 and 1, or None.")
        inputs = as_inputs(host, batch, input_device(host.model))
        massive = MassiveActivations(host, min_magnitude, min_ratio)
        marks = _Marks(host, Candidates(massive), Sequences.read(host, inputs), min_share)
        one_pass = Pass(host, min_magnitude, min_ratio, [massive, marks])
        one_pass.read([inputs], "ordinary tokens", progress=False)
        return marks.result()


class _KeyShares(AttentionEdit):
    """The mean share of attention that each token gets of the others, mean over heads.

    Attributes:
        received: (B, T); None: the attention has not run.
    """

    child = "key_shares"

    def __init__(self, route: type[EditedAttention], sequences: Sequences) -> None:
        super().__init__()
        self.route = route
        self.sequences = sequences
        self.received: Tensor | None = None

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        rows, _, queries, _ = call.q.shape
        keys = call.k.shape[2]
        if keys != queries:
            raise UnsupportedModel(
                f"model: an attention has {queries} queries and {keys} keys, so that its sinks"
                " cannot be located; pass min_share=None."
            )
        every = torch.arange(keys, device=call.q.device).expand(rows, -1)
        parts = [self._received(call, lse, at) for at in every.split(_AT_ONCE, 1)]
        self.received = torch.cat(parts, 1)

    def _received(self, call: Call, lse: Tensor, at: Tensor) -> Tensor:
        """(B, C): of the tokens at (B, C)."""
        length = call.q.shape[2]
        itself = torch.arange(length, device=at.device)[:, None] == at[:, None]
        others = self.sequences.queries(at, length) & ~itself
        enough = others.sum(1) >= _QUERIES
        share = shares(call, lse, at).mean(1)  # (B, T, C)
        return (share * mean_weights(others)).sum(1) * enough


class _Marks(Statistic):
    """The tokens of one batch that are not ordinary."""

    def __init__(
        self, host: Host, candidates: Candidates, sequences: Sequences, min_share: float | None
    ) -> None:
        super().__init__(host)
        self.candidates = candidates
        self.min_share = min_share
        self.found: list[Found] = []
        found = {} if min_share is None else attentions(host)
        self._places = [
            attention.place(layer, _KeyShares(attention.route, sequences))
            for layer, attention in found.items()
        ]

    def places(self) -> list[Place]:
        return self._places

    def see(self, output: BlockOutput) -> None:
        self.found.append(self.candidates.of(output))
        self._roles = output.roles

    def result(self) -> Tensor:
        ordinary = (self._roles != PADDING).cpu()
        keys = self.candidates.massive.massive_keys()
        for row, token, key in self.found:
            massive = torch.tensor([each in keys for each in key.tolist()], dtype=torch.bool)
            ordinary[row[massive], token[massive]] = False
        for layer, _, edit in self._places:
            assert isinstance(edit, _KeyShares)
            assert self.min_share is not None  # there are edits
            if edit.received is None or edit.received.shape != ordinary.shape:
                raise UnsupportedModel(
                    f"model: the attention of block {layer} did not reach this library's core for"
                    f" all {ordinary.shape[1]} tokens, so its sinks cannot be seen; pass"
                    " min_share=None to leave them out."
                )
            ordinary &= (edit.received <= self.min_share).cpu()
        return ordinary.to(input_device(self.host.model))
