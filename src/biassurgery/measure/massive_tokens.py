"""Which tokens of the vocabulary massive activations are on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption
from biassurgery.findings.observations import TokenCount
from biassurgery.findings.tally import role_of
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.statistic import BlockOutput, Statistic

NO_TOKEN = -1

Tokens = tuple[TokenCount, ...]


class TokensFound(NamedTuple):
    """The tokens of each (layer, role) and each (layer, position), the most frequent first."""

    of_role: dict[tuple[int, str], Tokens]
    of_position: dict[tuple[int, int], Tokens]


class MassiveTokens(Statistic):
    """How many values of each (layer, key of the value, position, token id) may be massive.

    Args:
        host: the model.
        candidates: tells which.
        tokenizer: gives the texts.

    Raises:
        BadOption: the model reads images.
    """

    name = "massive_tokens"
    in_batch = ()

    def __init__(self, host: Host, candidates: Candidates, tokenizer: Any) -> None:
        super().__init__(host)
        if host.adapter.modality != "text":
            raise BadOption("tokenizer: this model reads images; leave tokenizer= out.")
        if not callable(getattr(tokenizer, "decode", None)):
            raise BadOption(
                f"tokenizer: a {type(tokenizer).__name__}; give one of transformers, such as"
                " AutoTokenizer.from_pretrained(name)."
            )
        self.candidates = candidates
        self.tokenizer = tokenizer
        self.totals = Counter[tuple[int, int, int, int]]()

    def begin(self, batch: Mapping[str, Any]) -> None:
        ids = batch.get("input_ids")
        self._ids = None if ids is None else ids.cpu()

    def see(self, output: BlockOutput) -> None:
        found = self.candidates.of(output)
        tokens = self._tokens(output)[found.row, found.token]
        for key, position, token in zip(
            found.key.tolist(), found.token.tolist(), tokens.tolist(), strict=True
        ):
            self.totals[output.layer, key, position, token] += 1

    def _tokens(self, output: BlockOutput) -> Tensor:
        """(B, T) the id that stands at each position of the hidden state, `NO_TOKEN` if none."""
        rows, length = output.hidden.shape[:2]
        if self._ids is None:
            return output.roles.new_full((rows, length), NO_TOKEN).cpu()
        # A learned prefix stands in front of the tokens.
        return F.pad(self._ids, (length - self._ids.shape[1], 0), value=NO_TOKEN)

    def __add__(self, other: Statistic) -> MassiveTokens:
        assert isinstance(other, MassiveTokens)
        both = super().__add__(other)
        assert isinstance(both, MassiveTokens)
        both.candidates = self.candidates + other.candidates
        return both

    def result(self) -> TokensFound:
        massive = self.candidates.massive.massive_keys()
        roles: dict[tuple[int, str], Counter[int]] = {}
        positions: dict[tuple[int, int], Counter[int]] = {}
        for (layer, key, position, token), count in self.totals.items():
            if key in massive:
                role = self.host.roles[role_of(key, len(self.host.roles))]
                roles.setdefault((layer, role), Counter())[token] += count
                positions.setdefault((layer, position), Counter())[token] += count
        return TokensFound(
            {place: self._counts(counts) for place, counts in roles.items()},
            {place: self._counts(counts) for place, counts in positions.items()},
        )

    def _counts(self, counts: Counter[int]) -> Tokens:
        order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(TokenCount(token, self._text(token), count) for token, count in order)

    def _text(self, token: int) -> str:
        """A token as people read it; one that is a part of a character has its name instead."""
        if token == NO_TOKEN:
            return ""
        text = self.tokenizer.decode([token])
        readable = text and "\N{REPLACEMENT CHARACTER}" not in text
        return text if readable else str(self.tokenizer.convert_ids_to_tokens(token))
