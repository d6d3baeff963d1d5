"""The Bigram-Backcopy task: attention sinks and residual peaks at the smallest scale at which they
are known to emerge.

Source: Guo et al. 2024, "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token
    Phenomena in LLMs", section 2.
A sequence starts with <s>. After an ordinary token the next one is drawn from a bigram chain; after
a trigger it is a copy of the token BEFORE the trigger. A head that copies has something to do at
triggers only, and rests on a sink everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.data.packaged import packaged_text

TRIGGERS = "et "  # the most frequent characters of English: each takes a good part of the sequence
START = 0  # id of <s>; the characters follow


class Backcopy:
    """Bigram statistics of the packaged text, character by character.

    Attributes:
        tokens: vocabulary size, <s> included.
        chain: (tokens, tokens) float64, the distribution of the token after each ordinary token.
        trigger: (tokens,) bool.
    """

    def __init__(self) -> None:
        text = packaged_text("calibration") + packaged_text("evaluation")
        characters = sorted(set(text))
        self.tokens = len(characters) + 1
        code = {character: at for at, character in enumerate(characters, start=1)}
        ids = torch.tensor([code[character] for character in text])
        counts = (
            torch.bincount(ids[:-1] * self.tokens + ids[1:], minlength=self.tokens**2)
            .view(self.tokens, self.tokens)
            .double()
        )
        self.trigger = torch.zeros(self.tokens, dtype=torch.bool)
        self.trigger[[code[character] for character in TRIGGERS]] = True
        counts[START] = (
            torch.bincount(ids, minlength=self.tokens).double() * ~self.trigger
        )  # nothing to copy after <s>
        self.chain = counts / counts.sum(1, keepdim=True)
        self._cumulative = self.chain.cumsum(1)

    def sample(
        self, rows: int, length: int, generator: torch.Generator, held_out: bool = False
    ) -> Tensor:
        """(rows, length) int64. Fresh draws are held out from all others."""
        ids = torch.full((rows, length), START)
        uniform = torch.rand(length, rows, 1, dtype=torch.float64, generator=generator)
        for at in range(1, length):
            last = ids[:, at - 1]
            drawn = (
                torch.searchsorted(self._cumulative[last], uniform[at], right=True)
                .squeeze(1)
                .clamp(max=self.tokens - 1)
            )
            ids[:, at] = torch.where(
                self.trigger[last], ids[:, at - 2], drawn
            )  # <s> is no trigger, so at >= 2 where this counts
        return ids

    def scores(self, logits: Tensor, ids: Tensor) -> dict[str, float]:
        """What a prediction costs above the true distribution of the next token, in nats:
        Kullback-Leibler divergence.

        Args:
            logits: (B, T, at least `tokens`), the model's, for the token after each of the first T
                of `ids`.
            ids: (B, T + 1) int64.
        """
        log_probs = logits.cpu().double().log_softmax(-1)[..., : self.tokens]
        ids = ids.cpu()
        last = ids[:, :-1]
        copy = torch.nn.functional.one_hot(ids[:, 1:], self.tokens).double()
        truth = torch.where(self.trigger[last].unsqueeze(-1), copy, self.chain[last])
        excess = (torch.xlogy(truth, truth) - truth * log_probs).sum(-1)
        at_trigger = self.trigger[last]
        return {
            "excess_trigger": excess[at_trigger].mean().item(),
            "excess_other": excess[~at_trigger].mean().item(),
        }
