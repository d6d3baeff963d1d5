"""k', v' as what a stock sink can hold, one logit a head, and what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.registry import Host
from biassurgery.errors import warn
from biassurgery.evaluate.language import perplexity
from biassurgery.measure.sink_logits import fit_sink_logits
from biassurgery.patching import patched
from biassurgery.surgery.edit import Place, attach_all, detach_all, edits_in


@contextmanager
def with_fitted_logits(host: Host, batches: list[dict[str, Any]]) -> Iterator[None]:
    """Within the block a fitted sink logit a head stands where k', v' were; they come back.

    A warning says what that does to the perplexity of the batches.

    Args:
        host: a causal language model with nothing on it but k', v' in every layer.
        batches: as the model reads them.
    """
    logits = fit_sink_logits(host.model, batches)
    before = perplexity(host.model, batches, progress=False)
    places = [Place(None, module, edit) for module, edit in edits_in(host.root)]
    try:
        detach_all(places)
        with patched(host.model, "attention_bias", kind="sink_logit", init="normal"):
            with torch.no_grad():
                for fitted, attention in zip(logits, attentions(host).values()):
                    edit = attention.module.get_submodule("attention_bias_sink_logit")
                    edit.get_parameter("sink_logit").copy_(fitted)
            after = perplexity(host.model, batches, progress=False)
            warn(
                "format: 'sinks': a stock sink is one logit a head with the value 0, so what v'"
                " adds, and how k' tells queries apart, is lost: the perplexity of the batches is"
                f" {before:.4g} with them and {after:.4g} as it is written. Distillation goes on"
                " from there, examples/distill_sinks.py."
            )
            yield
    finally:
        attach_all(places)
