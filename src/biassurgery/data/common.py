"""What all evaluations share: the logits in an output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biassurgery.errors import UnsupportedModel


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Raises:
        UnsupportedModel: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModel(
            f"model: it returns {type(output).__name__}, which has no logits; load it with its"
            " head, for example with AutoModelForCausalLM or AutoModelForImageClassification."
        )
    return logits
